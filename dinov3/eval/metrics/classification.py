"""Top-k accuracy over all samples or as the mean over classes.

Notable:
- Ranks are counted instead of sorted: the target's rank is the number of classes with a larger score. Among equal
  scores the lower class comes first, so the result does not depend on the device or on how samples are batched.
- States are integer counters, summed over processes by `compute`; nothing is kept per sample.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from dinov3 import distributed


class AveragingMethod(Enum):
    """How samples become one number: each sample counts alike, or each class does."""

    MEAN_ACCURACY = "micro"
    MEAN_PER_CLASS_ACCURACY = "macro"

    def __str__(self) -> str:
        return self.value


class ClassificationMetricType(Enum):
    """The metrics that an evaluation can report."""

    MEAN_ACCURACY = "mean_accuracy"
    MEAN_PER_CLASS_ACCURACY = "mean_per_class_accuracy"

    @property
    def averaging_method(self) -> AveragingMethod:
        """How this metric averages."""
        return AveragingMethod[self.name]

    def __str__(self) -> str:
        return self.value


class TopKAccuracy(nn.Module):
    """Share of samples whose target is among the k classes with the largest scores.

    Args:
        num_classes: number of score columns C.
        ks: one result per entry.
        average: `MEAN_ACCURACY`: over samples. `MEAN_PER_CLASS_ACCURACY`: mean over classes of the share in each class,
            where classes without samples are left out, except that for k = 1 one that was predicted counts as 0.
    """

    def __init__(self, num_classes: int, ks: Sequence[int], average: AveragingMethod) -> None:
        super().__init__()
        self.ks = tuple(ks)
        self.average = average
        # [k..., C] hits by k, then how often each class was the target, then how often it was predicted.
        self.counts: Tensor
        self.register_buffer("counts", torch.zeros(len(self.ks) + 2, num_classes, dtype=torch.int64), persistent=False)

    def reset(self) -> None:
        """Forget all samples."""
        self.counts.zero_()

    def clone(self) -> TopKAccuracy:
        """A copy with its own counters."""
        return copy.deepcopy(self)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: scores [B, C].
            target: classes [B], integers in [0, C).
        """
        target = target.long()
        rank = target_rank(preds, target)
        weights = [rank < k for k in self.ks]
        for row, weight in enumerate([*weights, torch.ones_like(rank)]):
            self.counts[row].scatter_add_(0, target, weight.long())
        predicted = preds.argmax(dim=1) if len(preds) else target
        self.counts[-1].scatter_add_(0, predicted, torch.ones_like(predicted))

    def compute(self) -> dict[str, Tensor]:
        """`{"top-<k>": fraction}` (float32, 0-dimensional) over the samples of all processes; NaN without samples."""
        counts = distributed.all_reduce(self.counts.clone())
        present, predicted = counts[-2], counts[-1]
        return {f"top-{k}": self._share(k, counts[row], present, predicted) for row, k in enumerate(self.ks)}

    def _share(self, k: int, hits: Tensor, present: Tensor, predicted: Tensor) -> Tensor:
        if self.average is AveragingMethod.MEAN_ACCURACY:
            return (hits.sum().double() / present.sum()).float()
        counted = present + predicted > 0 if k == 1 else present > 0
        return (hits.double() / present.clamp(min=1))[counted].mean().float()


def target_rank(scores: Tensor, target: Tensor) -> Tensor:
    """How many classes come before the target: those with a larger score, and lower classes with an equal one.

    Args:
        scores: [B, C].
        target: [B], integers in [0, C).

    Returns:
        int64 [B].
    """
    own = scores.gather(1, target[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    return ((scores > own) | ((scores == own) & lower)).sum(dim=1)


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Percentage of rows of `output` [B, C] whose `target` [B] is among the k largest, for each k of `topk`."""
    rank = target_rank(output, target)
    return [(rank < k).float().mean() * 100 for k in topk]


def build_topk_accuracy_metric(
    average_type: AveragingMethod, num_classes: int, ks: Sequence[int] | None = None
) -> TopKAccuracy:
    """A `TopKAccuracy`; `ks` is (1, 5) by default, or (1,) below five classes."""
    return TopKAccuracy(num_classes, ks or ((1, 5) if num_classes >= 5 else (1,)), average_type)


def build_classification_metric(
    metric_type: ClassificationMetricType, *, num_classes: int, ks: Sequence[int] | None = None
) -> TopKAccuracy:
    """The metric of a type.

    Args:
        metric_type: what to report.
        num_classes: number of score columns.
        ks: top-k values; (1, 5) by default, or (1,) below five classes.

    Returns:
        An object with `update(preds, target)`, `compute() -> {"top-<k>": fraction}`, `reset()` and `clone()`.
    """
    return build_topk_accuracy_metric(metric_type.averaging_method, num_classes, ks)
