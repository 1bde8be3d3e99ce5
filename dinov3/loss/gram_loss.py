"""Gram anchoring: keep the similarities between patches as an earlier teacher had them (arXiv 2508.10104, section 4).

The features themselves stay free; only the matrix of their cosine similarities is tied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GramLoss(nn.Module):
    """Mean squared difference between the similarity matrices of student and Gram teacher.

    Args:
        apply_norm: compare cosine similarities instead of dot products.
        img_level: has no effect, as in the published code; the argument of the call counts.
        remove_neg: negative similarities of both count as 0.
        remove_only_teacher_neg: negative similarities of the teacher count as 0, the student's stay (even where both
            are negative, which the published code does, although it means otherwise).

    Raises:
        ValueError: both `remove_neg` and `remove_only_teacher_neg`.
    """

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = True,
        remove_only_teacher_neg: bool = False,
    ) -> None:
        super().__init__()
        if remove_neg and remove_only_teacher_neg:
            raise ValueError(
                "gram.remove_neg and gram.remove_only_teacher_neg exclude each other: set one of them false"
            )
        self.apply_norm = apply_norm
        self.remove_neg = remove_neg
        self.remove_only_teacher_neg = remove_only_teacher_neg

    def forward(self, output_feats: Tensor, target_feats: Tensor, img_level: bool = True) -> Tensor:
        """Compare the patches of each image, or of the whole batch, with one another.

        Args:
            output_feats: the student's patch tokens, [n, P, D], or without `img_level` also [rows, D].
            target_feats: the Gram teacher's, of the same patches; D may differ.
            img_level: similarities within each image ([P, P] per image); otherwise between all rows of the batch.

        Returns:
            0-dim float32, the mean over all entries of the matrices; 0 where there are none.

        Raises:
            ValueError: the features do not have the dimensions above.
        """
        if output_feats.shape[:-1] != target_feats.shape[:-1]:
            raise ValueError(
                f"student features {list(output_feats.shape)} and teacher features {list(target_feats.shape)} must be "
                "of the same patches"
            )
        if img_level and output_feats.ndim != 3:
            raise ValueError(f"img_level=True needs features [images, patches, D], got {list(output_feats.shape)}")
        student = self._similarities(output_feats, img_level)
        teacher = self._similarities(target_feats, img_level)
        if self.remove_neg:
            student = student.clamp(min=0)
        if self.remove_neg or self.remove_only_teacher_neg:
            teacher = teacher.clamp(min=0)
        # Without masks, a process has no masked patches to compare, and the mean of nothing is NaN.
        return F.mse_loss(student, teacher) if student.numel() else student.sum()

    def _similarities(self, features: Tensor, img_level: bool) -> Tensor:
        features = features.float()
        if self.apply_norm:
            features = F.normalize(features, dim=-1)
        if not img_level:
            features = features.flatten(0, -2)  # [rows, D]
        with torch.autocast(features.device.type, enabled=False):
            return features @ features.mT  # [n, P, P] or [rows, rows]


def sampled_gram_loss(
    backbone_patch_tokens: Tensor, patch_tokens: Tensor, patch_sampling_rate: float = 1.0, normalize: bool = True
) -> Tensor:
    """Keep the similarities between the patches of a head as its backbone has them (dino.txt, arXiv 2412.16334).

    The backbone's side has no gradient.

    Args:
        backbone_patch_tokens: [B, P, D1].
        patch_tokens: [B, P, D2], the head's.
        patch_sampling_rate: share of the P patches that are compared, the same ones in all images.
        normalize: compare cosine similarities instead of dot products.

    Returns:
        0-dim float32, the mean squared difference of the [B, k, k] similarities.

    Raises:
        ValueError: no patch is left to compare.
    """
    n_patches = patch_tokens.shape[1]
    # Drawn on the CPU, and also at rate 1, as published: the same seed then draws the same patches everywhere.
    sampled = torch.randperm(n_patches)[: int(n_patches * patch_sampling_rate)].to(patch_tokens.device)
    if len(sampled) == 0:
        raise ValueError(f"patch_sampling_rate={patch_sampling_rate} leaves none of {n_patches} patches")
    loss = GramLoss(apply_norm=normalize, remove_neg=False)
    return loss(patch_tokens[:, sampled], backbone_patch_tokens[:, sampled].detach())
