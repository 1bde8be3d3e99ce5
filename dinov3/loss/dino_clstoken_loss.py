"""The DINO loss on class tokens (arXiv 2104.14294, section 3; 2304.07193, section 4).

The student's distribution over K prototypes, for every crop, has to predict the teacher's for every global crop of the
same image.
"""

from __future__ import annotations

from torch import Tensor

from dinov3.loss.sinkhorn import sinkhorn_knopp
from dinov3.loss.softmax_centering import CenteredLoss, soft_cross_entropy


class DINOLoss(CenteredLoss):
    """Cross-entropy between the class-token distributions of student and teacher crops.

    Args:
        out_dim: K, number of prototypes.
        student_temp: temperature of the student's softmax.
        center_momentum: of the softmax centring, which the recipes do not use.
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, out_dim), student_temp, center_momentum)

    def sinkhorn_knopp_teacher(self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3) -> Tensor:
        """Make targets from the teacher's logits.

        Args:
            teacher_output: [N, K], the class tokens of *all* global crops of this rank together, crop-major.
            teacher_temp: > 0.
            n_iterations: rounds of Sinkhorn-Knopp.

        Returns:
            [N, K] float32, rows sum to 1, without gradient.
        """
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def forward(self, student_logits: Tensor, teacher_probs: Tensor, ignore_diagonal: bool = False) -> Tensor:
        """Compute the mean cross-entropy over all pairs of a student and a teacher crop, and over the images.

        Args:
            student_logits: [s, B, K], any floating dtype.
            teacher_probs: [t, B, K], float32 distributions.
            ignore_diagonal: leave out the pairs of equal crop index, for which both networks see the same pixels.

        Returns:
            0-dim float32.

        Raises:
            ValueError: the shapes do not fit, or no pair of crops is left.
        """
        if student_logits.shape[1:] != teacher_probs.shape[1:]:
            raise ValueError(
                f"student_logits {list(student_logits.shape)} and teacher_probs {list(teacher_probs.shape)} must agree "
                "in all dimensions but the first (crops)"
            )
        n_student, n_teacher, n_equal = len(student_logits), len(teacher_probs), 0
        # The loss is linear in the teacher, so one pass over the student's crops serves all teacher crops.
        targets = teacher_probs.float().sum(0, keepdim=True)  # [1, B, K]
        if ignore_diagonal:
            n_equal = min(n_student, n_teacher)
            targets = targets.repeat(n_student, 1, 1)  # [s, B, K]
            targets[:n_equal] -= teacher_probs[:n_equal]
        n_pairs = n_student * n_teacher - n_equal
        if n_pairs == 0:
            raise ValueError(
                f"no pair of crops to compare: {n_student} student and {n_teacher} teacher crops with "
                f"ignore_diagonal={ignore_diagonal}; use at least two global crops or ignore_diagonal=False"
            )
        return soft_cross_entropy(student_logits, targets, self.student_temp).mean(1).sum() / n_pairs
