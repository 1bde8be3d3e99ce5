"""The iBOT loss on masked patches (arXiv 2111.07832, section 3; 2304.07193, section 4).

The student sees a global crop with masked patches and has to predict, at these, the distribution that the teacher
gives to the unmasked patch.
"""

from __future__ import annotations

from torch import Tensor

from dinov3.loss.sinkhorn import sinkhorn_knopp
from dinov3.loss.softmax_centering import CenteredLoss, soft_cross_entropy


class iBOTPatchLoss(CenteredLoss):
    """Cross-entropy between the patch distributions of student and teacher, weighted per crop.

    Args:
        patch_out_dim: K, number of prototypes.
        student_temp: temperature of the student's softmax.
        center_momentum: of the softmax centring, which the recipes do not use.
    """

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, 1, patch_out_dim), student_temp, center_momentum)

    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor | None = None,
        n_iterations: int = 3,
    ) -> Tensor:
        """Make targets from the teacher's logits.

        Args:
            teacher_output: [M, K], the masked patches of this rank; M differs between ranks and may be 0.
            teacher_temp: > 0.
            n_masked_patches_tensor: ignored, because the number of samples cancels; part of the published signature.
            n_iterations: rounds of Sinkhorn-Knopp.

        Returns:
            [M, K] float32, rows sum to 1, without gradient.
        """
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def forward(self, student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
        """Compute the loss from the logits of all patches.

        Args:
            student: [n, P, K] logits of n global crops.
            teacher: [n, P, K] distributions.
            masks: [n, P], true (non-zero) where a patch counts.

        Returns:
            0-dim float32: the mean over the masked patches of each crop, then over all crops (0 for an unmasked one).
        """
        weights = masks.float()
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1.0)
        return (soft_cross_entropy(student, teacher, self.student_temp) * weights).sum(-1).mean()

    def forward_masked(
        self,
        student: Tensor,
        teacher: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss from the logits of only the masked patches.

        Args:
            student: [M', K] logits, M' >= M.
            teacher: [M', K] distributions of the same patches.
            student_masks_flat: bool [n, P], the masks of *all* n global crops, also of unmasked ones.
            n_masked_patches: M; rows after it are padding and do not count. Default: all rows count.
            masks_weight: [M]. Default: 1 / (number of masked patches of the patch's crop).

        Returns:
            0-dim float32: the weighted sum of the cross-entropies divided by n. Crops without a mask enlarge n, so with
            half of the crops masked the value is about half of the mean cross-entropy. 0 when M is 0.
        """
        if masks_weight is None:
            counts = student_masks_flat.sum(-1, keepdim=True).clamp(min=1)  # [n, 1]
            masks_weight = counts.float().reciprocal().expand_as(student_masks_flat)[student_masks_flat]  # [M]
        if n_masked_patches is not None:
            student, teacher = student[:n_masked_patches], teacher[:n_masked_patches]
            masks_weight = masks_weight[:n_masked_patches]
        loss = soft_cross_entropy(student, teacher, self.student_temp)  # [M]
        return (loss * masks_weight).sum() / len(student_masks_flat)
