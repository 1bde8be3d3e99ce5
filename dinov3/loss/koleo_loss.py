"""The KoLeo regulariser: spread the features of a batch (arXiv 1806.03198; 2304.07193, section 4).

It is the Kozachenko-Leonenko estimate of differential entropy: the mean negative logarithm of the distance from each
normalised feature to its nearest neighbour.

Notable:
- Everything is float32, even for bfloat16 features: in bfloat16 a value near 1.3 moves in steps of 0.008.
- The choice of the nearest neighbour has no gradient; both ends of the distance have one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.distributed import all_gather_with_grad, get_subgroup_rank, get_subgroup_size


class KoLeoLoss(nn.Module):
    """KoLeo within the batch of this process."""

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Compute the mean negative log distance to the nearest other row.

        Args:
            student_output: [B, D], B >= 2, any floating dtype.
            eps: smallest norm in the normalisation, and added to distances before the logarithm.

        Returns:
            0-dim float32.

        Raises:
            ValueError: B < 2.
        """
        if len(student_output) < 2:
            raise ValueError(
                f"KoLeo needs at least 2 images per process to find a neighbour, got {len(student_output)}: raise "
                "train.batch_size_per_gpu to 2 or more, set dino.koleo_loss_distributed=true, or "
                "dino.koleo_loss_weight=0"
            )
        features = _normalize(student_output, eps)
        return _mean_negative_log_distance(features, features, first_row=0, topk=1, eps=eps)


class KoLeoLossDistributed(nn.Module):
    """KoLeo among the images of several processes of the subgroup.

    Args:
        topk: number of nearest neighbours that count.
        loss_group_size: number of images among which neighbours are searched, held by consecutive ranks. Default: the
            images of all ranks of the subgroup.

    Raises:
        ValueError: a value below 1.
    """

    def __init__(self, topk: int = 1, loss_group_size: int | None = None) -> None:
        super().__init__()
        if topk < 1:
            raise ValueError(f"KoLeo's topk is {topk}, expected at least 1")
        if loss_group_size is not None and loss_group_size < 1:
            raise ValueError(f"KoLeo's loss_group_size is {loss_group_size}, expected at least 1 or None")
        self.topk = topk
        self.loss_group_size = loss_group_size

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Compute the mean negative log distance from each row of this rank to its `topk` nearest rows of the group.

        Args:
            student_output: [b, D], equal b on all ranks, any floating dtype.
            eps: smallest norm in the normalisation, and added to distances before the logarithm.

        Returns:
            0-dim float32, over this rank's rows. In the backward pass, which every rank must run, the features of other
            ranks receive their gradient from here.

        Raises:
            ValueError: the group size does not fit the batch, or is not larger than `topk`.
        """
        batch_size = len(student_output)
        group_size = self._group_size(batch_size)
        ranks_per_group = group_size // batch_size
        group, position = divmod(get_subgroup_rank(), ranks_per_group)

        features = _normalize(student_output, eps)  # [b, D]
        all_features = all_gather_with_grad(features)  # [W * b, D]
        return _mean_negative_log_distance(
            features,
            all_features[group * group_size : (group + 1) * group_size],
            first_row=position * batch_size,
            topk=self.topk,
            eps=eps,
        )

    def _group_size(self, batch_size: int) -> int:
        n_ranks = get_subgroup_size()
        total = batch_size * n_ranks
        size = total if self.loss_group_size is None else self.loss_group_size
        if batch_size == 0 or size % batch_size or total % size:
            raise ValueError(
                f"KoLeo's loss_group_size {size} does not fit {batch_size} images per process on "
                f"{n_ranks} processes ({total} images): it must be a multiple of the images per process and divide the "
                "total; change train.batch_size_per_gpu or dino.koleo_distributed_loss_group_size"
            )
        if self.topk >= size:
            raise ValueError(
                f"KoLeo with topk {self.topk} needs groups of at least {self.topk + 1} images, got {size} "
                f"({batch_size} per process on {n_ranks} processes): raise train.batch_size_per_gpu or "
                "dino.koleo_distributed_loss_group_size, or lower dino.koleo_topk"
            )
        return size


def _normalize(features: Tensor, eps: float) -> Tensor:
    return F.normalize(features.float(), dim=-1, eps=eps)


def _mean_negative_log_distance(own: Tensor, group: Tensor, *, first_row: int, topk: int, eps: float) -> Tensor:
    with torch.no_grad(), torch.autocast(own.device.type, enabled=False):
        similarity = own @ group.T  # [b, n]
        similarity.diagonal(first_row).fill_(-torch.inf)  # a row is not its own neighbour
        nearest = similarity.topk(topk, dim=-1).indices
    distances = F.pairwise_distance(own.unsqueeze(1), group[nearest], eps=1e-8)  # [b, topk]
    return -(distances + eps).log().mean()
