"""Metrics of score curves: they need the scores of all samples, in whatever order."""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor, nn

from dinov3 import distributed

VOC2007_RECALLS = 11


class ScoresMetric(nn.Module):
    """Keeps all scores and targets, on the CPU; a subclass says what they are worth for one class.

    Args:
        num_classes: number of score columns C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self._batches: list[tuple[Tensor, Tensor]] = []

    def reset(self) -> None:
        """Forget all samples."""
        self._batches.clear()

    def clone(self) -> Self:
        """Return a copy with its own samples."""
        return copy.deepcopy(self)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep a batch of scores [B, C] and classes [B], or multi-hot targets [B, C]."""
        self._batches.append((preds.detach().float().cpu(), target.cpu()))

    def compute(self) -> dict[str, Tensor]:
        """Return `{"top-1": mean over the classes}` of the samples of all processes."""
        scores, targets = (
            torch.cat(distributed.gather_all_tensors(torch.cat(parts))) for parts in zip(*self._batches, strict=True)
        )
        is_positive = targets[:, None] == torch.arange(self.num_classes) if targets.ndim == 1 else targets > 0
        columns = zip(self.prepare(scores).T, is_positive.T, strict=True)
        return {"top-1": torch.stack([self.of_class(*column) for column in columns]).mean().float()}

    def prepare(self, scores: Tensor) -> Tensor:
        """Return the scores [N, C] that classes are ranked by."""
        return scores

    def of_class(self, scores: Tensor, is_positive: Tensor) -> Tensor:
        """Return the value for one class, from its scores [N] and which samples [N] are of it."""
        raise NotImplementedError


class MacroAUROC(ScoresMetric):
    """Mean over classes of the area under the ROC curve of one class against the rest; 0 for an absent class."""

    def prepare(self, scores: Tensor) -> Tensor:
        """Turn scores that are not probabilities into such; the softmax mixes the columns, so it changes the order."""
        are_probabilities = ((scores >= 0) & (scores <= 1)).all()
        return scores if are_probabilities else scores.softmax(dim=1)

    def of_class(self, scores: Tensor, is_positive: Tensor) -> Tensor:
        """Return the share of (positive, negative) pairs in order, half for equal scores, from the positives' ranks."""
        _, group, counts = scores.unique(return_inverse=True, return_counts=True)
        rank = (counts.cumsum(0).double() - (counts - 1) / 2)[group]  # from 1, the mean of equal ones
        n_positive, n_negative = int(is_positive.sum()), int((~is_positive).sum())
        in_order = rank[is_positive].sum() - n_positive * (n_positive + 1) / 2
        return in_order / max(1, n_positive * n_negative)


class MacroAveragePrecision(ScoresMetric):
    """Mean over classes of the area under the precision-recall steps; 0 for a class without positives."""

    def of_class(self, scores: Tensor, is_positive: Tensor) -> Tensor:
        """Return the average precision."""
        precision, recall = precision_recall_points(scores, is_positive)
        return (precision * recall.diff(prepend=recall.new_zeros(1))).sum()


class MeanAveragePrecisionVOC2007(ScoresMetric):
    """Mean over classes of the 11-point interpolated average precision of PASCAL VOC 2007."""

    def of_class(self, scores: Tensor, is_positive: Tensor) -> Tensor:
        """Return the interpolated average precision."""
        precision, recall = precision_recall_points(scores, is_positive)
        # Precision 1 at recall 0 counts as a point, as in published figures; it adds up to 1/11.
        precision, recall = torch.cat([precision, scores.new_ones(1)]), torch.cat([recall, scores.new_zeros(1)])
        levels = torch.linspace(0, 1, VOC2007_RECALLS)
        reached = torch.where(recall >= levels[:, None], precision, 0.0)  # [11, K]
        return reached.amax(dim=1).mean()


def precision_recall_points(scores: Tensor, is_positive: Tensor) -> tuple[Tensor, Tensor]:
    """Compute precision and recall at every distinct score, from the largest down.

    Args:
        scores: [N].
        is_positive: boolean [N].

    Returns:
        float32 [K] each; empty without positives.
    """
    if not is_positive.any():
        return scores[:0], scores[:0]
    order = scores.argsort(descending=True, stable=True)
    ordered, hits = scores[order], is_positive[order].cumsum(0)
    is_last = torch.ones_like(ordered, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    predicted = torch.arange(1, len(scores) + 1)
    return (hits / predicted)[is_last].float(), (hits / hits[-1])[is_last].float()
