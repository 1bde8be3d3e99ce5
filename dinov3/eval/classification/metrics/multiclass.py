"""Metrics of problems with one class per sample, besides accuracy: F1, area under the ROC curve, reciprocal rank."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.eval.classification.metrics.classification import AveragingMethod, CountingMetric, TopKAccuracy
from dinov3.eval.classification.metrics.curves import ScoresMetric, leave_unit_interval

RECIPROCAL_RANK_EPS = 1e-6


class MulticlassF1(TopKAccuracy):
    """F1 of the best class, over samples (which is the accuracy) or as the mean over classes that occur or were said.

    Args:
        num_classes: number of score columns.
        average: `MEAN_MULTICLASS_F1` or `MEAN_PER_CLASS_MULTICLASS_F1`.
    """

    def __init__(self, num_classes: int, average: AveragingMethod) -> None:
        super().__init__(num_classes, (1,), average)

    def compute(self) -> dict[str, Tensor]:
        """`{"top-1": F1}` over the samples of all processes."""
        hits, present, predicted = distributed.all_reduce(self.counts.clone()).double()
        if self.average is AveragingMethod.MEAN_MULTICLASS_F1:
            return {"top-1": (hits.sum() / present.sum()).float()}
        occurs = present + predicted > 0
        return {"top-1": (2 * hits / (present + predicted))[occurs].mean().float()}


class MacroAveragedMeanReciprocalRank(CountingMetric):
    """Mean over all classes of the mean of 1 / rank of the target; of equal scores the target comes last.

    Args:
        num_classes: number of score columns.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_counter("sums", num_classes, dtype=torch.float64)
        self.add_counter("counts", num_classes)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch of scores [B, C] and classes [B]."""
        target = target.long()
        rank = (~(preds < preds.gather(1, target[:, None]))).sum(dim=1)  # NaN is no hit
        self.sums.scatter_add_(0, target, 1 / rank.double())
        self.counts.scatter_add_(0, target, torch.ones_like(target))

    def compute(self) -> dict[str, Tensor]:
        """`{"top-1": mean}` over the samples of all processes; a class without samples counts as 0."""
        sums, counts = (distributed.all_reduce(t.clone()) for t in (self.sums, self.counts))
        return {"top-1": (sums / (counts + RECIPROCAL_RANK_EPS)).mean().float()}


class MacroAUROC(ScoresMetric):
    """Mean over classes of the area under the ROC curve of one class against the rest; 0 for an absent class."""

    def compute(self) -> dict[str, Tensor]:
        """`{"top-1": area}` over the samples of all processes."""
        scores, targets = self.gather()
        if leave_unit_interval(scores):
            scores = scores.softmax(dim=1)
        is_class = targets[:, None] == torch.arange(scores.shape[1], device=scores.device)
        return {"top-1": _area_under_roc(scores, is_class).mean().float()}


def _area_under_roc(scores: Tensor, is_positive: Tensor) -> Tensor:
    # [C]: the share of (positive, negative) pairs in order, half for equal scores, from the ranks of the positives.
    areas = []
    for column, positive in zip(scores.T, is_positive.T, strict=True):
        _, group, counts = column.unique(return_inverse=True, return_counts=True)
        rank = (counts.cumsum(0).double() - (counts - 1) / 2)[group]  # from 1, the mean of equal ones
        n_positive, n_negative = int(positive.sum()), int((~positive).sum())
        in_order = rank[positive].sum() - n_positive * (n_positive + 1) / 2
        areas.append(in_order / max(1, n_positive * n_negative))
    return torch.stack(areas)
