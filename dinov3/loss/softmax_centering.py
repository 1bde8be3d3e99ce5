"""What the DINO and iBOT losses share: a soft cross-entropy, and the softmax centring of DINO (arXiv 2104.14294).

DINOv3 centres the teacher with Sinkhorn-Knopp instead (`dinov3.loss.sinkhorn`); no recipe uses the moving-average
centre, which is there for comparisons.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.distributed import all_reduce, get_subgroup_size


def soft_cross_entropy(student_logits: Tensor, teacher_probs: Tensor, student_temp: float) -> Tensor:
    """Compute the cross-entropy of softmax(student_logits / student_temp) with the teacher's distributions.

    Args:
        student_logits: [..., K], any floating dtype.
        teacher_probs: [..., K], float32; leading dimensions broadcast.
        student_temp: > 0.

    Returns:
        [...], float32.
    """
    log_probs = F.log_softmax(student_logits.float() / student_temp, dim=-1)
    return -(teacher_probs.float() * log_probs).sum(-1)


class CenteredLoss(nn.Module):
    """The base of losses with a student temperature and a moving-average centre of the teacher's logits.

    The centre is updated lazily: the statistic of one step is applied when the next step's targets are made.

    Args:
        center_shape: [1, ..., K].
        student_temp: temperature of the student's softmax.
        center_momentum: how much of the old centre an update keeps.
    """

    center: Tensor

    def __init__(self, center_shape: tuple[int, ...], student_temp: float, center_momentum: float) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.full(center_shape, torch.nan))
        self._pending: tuple[Tensor, int] | None = None

    def init_weights(self) -> None:
        """Start from a centre of zeros."""
        self.center.zero_()

    @torch.no_grad()
    def softmax_center_teacher(
        self, teacher_output: Tensor, teacher_temp: float, update_centers: bool = True
    ) -> Tensor:
        """Make targets by centring and sharpening.

        Args:
            teacher_output: [..., K] logits of as many dimensions as the centre.
            teacher_temp: > 0.
            update_centers: apply a pending update of the centre first.

        Returns:
            Distributions of the shape of `teacher_output`.
        """
        if update_centers:
            self.apply_center_update()
        return F.softmax((teacher_output - self.center) / teacher_temp, dim=-1)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Sum this step's logits over all samples of the subgroup, for the next step's centre.

        Args:
            teacher_output: [N, K], or [N, P, K] for patches, which are averaged over P; the same N on all ranks.
        """
        logits = teacher_output.float()
        if logits.ndim == 3:
            logits = logits.mean(1, keepdim=True)
        total = all_reduce(logits.sum(0, keepdim=True))
        self._pending = total, len(logits) * get_subgroup_size()

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Move the centre towards the mean logits of the last `update_center`, once."""
        if self._pending is None:
            return
        total, n_samples = self._pending
        self.center.lerp_(total / n_samples, 1 - self.center_momentum)
        self._pending = None
