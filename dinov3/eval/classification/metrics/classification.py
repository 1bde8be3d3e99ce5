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
from typing import Self

import torch
from torch import Tensor, nn

from dinov3 import distributed


class AveragingMethod(Enum):
    """How samples become one number: each sample counts alike, or each class does; or there is one for each class."""

    MEAN_ACCURACY = "micro"
    MEAN_RECALL = MEAN_ACCURACY
    MEAN_PER_CLASS_ACCURACY = "macro"
    MEAN_PER_CLASS_RECALL = MEAN_PER_CLASS_ACCURACY
    PER_CLASS_ACCURACY = "none"
    MEAN_MULTICLASS_F1 = MEAN_ACCURACY  # noqa: PIE796 aliases are meant
    MEAN_PER_CLASS_MULTICLASS_F1 = MEAN_PER_CLASS_ACCURACY  # noqa: PIE796
    MEAN_MULTILABEL_F1 = MEAN_ACCURACY  # noqa: PIE796
    MEAN_PER_CLASS_MULTILABEL_F1 = MEAN_PER_CLASS_ACCURACY  # noqa: PIE796

    def __str__(self) -> str:
        return self.value


class ClassificationMetricType(Enum):
    """The metrics that an evaluation can report."""

    AUROC = "auroc"
    MEAN_ACCURACY = "mean_accuracy"
    MEAN_RECALL = "mean_recall"
    MEAN_PER_CLASS_ACCURACY = "mean_per_class_accuracy"
    MEAN_PER_CLASS_RECALL = "mean_per_class_recall"
    PER_CLASS_ACCURACY = "per_class_accuracy"
    MEAN_AVERAGE_PRECISION_VOC_2007 = "map_voc2007"
    ANY_MATCH_ACCURACY = "any_match_accuracy"
    GROUPBY_ANY_MATCH_ACCURACY_1 = "groupby_any_match_accuracy_1"
    GROUPBY_ANY_MATCH_ACCURACY_5 = "groupby_any_match_accuracy_5"
    MEAN_MULTICLASS_F1 = "mean_multiclass_f1"
    MEAN_PER_CLASS_MULTICLASS_F1 = "mean_per_class_multiclass_f1"
    MEAN_MULTILABEL_F1 = "mean_multilabel_f1"
    MEAN_PER_CLASS_MULTILABEL_F1 = "mean_per_class_multilabel_f1"
    IMAGENET_C_METRIC = "imagenet_c_metric"
    MACRO_AVERAGED_MEAN_RECIPROCAL_RANK = "macro_averaged_mean_reciprocal_rank"
    MACRO_MULTILABEL_AVERAGE_PRECISION = "macro_multilabel_average_precision"

    @property
    def averaging_method(self) -> AveragingMethod | None:
        """How this metric averages; None where there is but one way."""
        return AveragingMethod.__members__.get(self.name)

    @property
    def is_topk_accuracy(self) -> bool:
        """Whether it is an accuracy for several k."""
        return self.name in ("MEAN_ACCURACY", "MEAN_PER_CLASS_ACCURACY", "PER_CLASS_ACCURACY")

    @property
    def is_topk_recall(self) -> bool:
        """Whether it is a recall for several k."""
        return self.name in ("MEAN_RECALL", "MEAN_PER_CLASS_RECALL")

    @property
    def is_multilabel(self) -> bool:
        """Whether the release counts it among the multi-label metrics; `target_kind` tells what targets it takes."""
        by_targets = self.target_kind in (TargetKind.MULTI_HOT, TargetKind.LISTS, TargetKind.INDICES)
        return by_targets and self is not ClassificationMetricType.MACRO_MULTILABEL_AVERAGE_PRECISION

    @property
    def target_kind(self) -> TargetKind:
        """What its targets look like."""
        if self.name.startswith("GROUPBY"):
            return TargetKind.INDICES
        if self is ClassificationMetricType.ANY_MATCH_ACCURACY:
            return TargetKind.LISTS
        if self is ClassificationMetricType.IMAGENET_C_METRIC:
            return TargetKind.CORRUPTIONS
        is_multi_hot = "MULTILABEL" in self.name or "VOC" in self.name
        return TargetKind.MULTI_HOT if is_multi_hot else TargetKind.CLASSES

    @property
    def is_lower_better(self) -> bool:
        """Whether a smaller value is the better one."""
        return self is ClassificationMetricType.IMAGENET_C_METRIC

    def __str__(self) -> str:
        return self.value


class TargetKind(Enum):
    """What the targets of a metric look like."""

    CLASSES = "one class per image"
    MULTI_HOT = "multi-hot rows"
    LISTS = "a list of classes per image"
    INDICES = "images that know their groups (get_groupby_labels and get_mapped_targets)"
    CORRUPTIONS = "rows of class, corruption and level"


class CountingMetric(nn.Module):
    """A metric whose state is buffers, which are 0 at first and summed over processes."""

    def __init__(self) -> None:
        super().__init__()
        self._counters: list[str] = []

    def add_counter(self, name: str, *shape: int, dtype: torch.dtype = torch.int64) -> None:
        """Make an attribute of zeros."""
        self.register_buffer(name, torch.zeros(shape, dtype=dtype), persistent=False)
        self._counters.append(name)

    def reset(self) -> None:
        """Forget all samples."""
        for name in self._counters:
            getattr(self, name).zero_()

    def clone(self) -> Self:
        """A copy with its own counters."""
        return copy.deepcopy(self)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch of scores [B, C] and targets."""
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        """The results by name, over the samples of all processes."""
        raise NotImplementedError


class TopKAccuracy(CountingMetric):
    """Share of samples whose target is among the k classes with the largest scores.

    Args:
        num_classes: number of score columns C.
        ks: one result per entry.
        average: `MEAN_ACCURACY`: over samples. `MEAN_PER_CLASS_ACCURACY`: mean over classes of the share in each class,
            where classes without samples are left out, except that for k = 1 one that was predicted counts as 0.
            `PER_CLASS_ACCURACY`: the share in each class, 0 without samples.
    """

    counts: Tensor

    def __init__(self, num_classes: int, ks: Sequence[int], average: AveragingMethod) -> None:
        super().__init__()
        self.ks = tuple(ks)
        self.average = average
        # [k..., C] hits by k, then how often each class was the target, then how often it was predicted.
        self.add_counter("counts", len(self.ks) + 2, num_classes)

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
        """`{"top-<k>": fraction}` over the samples of all processes, float32; NaN without samples.

        Fractions are 0-dimensional, or [C] for `PER_CLASS_ACCURACY`.
        """
        counts = distributed.all_reduce(self.counts.clone())
        present, predicted = counts[-2], counts[-1]
        return {f"top-{k}": self._share(k, counts[row], present, predicted) for row, k in enumerate(self.ks)}

    def present(self) -> Tensor:
        """Boolean [C]: which classes have samples in any process."""
        return distributed.all_reduce(self.counts[-2].clone()) > 0

    def _share(self, k: int, hits: Tensor, present: Tensor, predicted: Tensor) -> Tensor:
        if self.average is AveragingMethod.MEAN_ACCURACY:
            return (hits.sum().double() / present.sum()).float()
        if self.average is AveragingMethod.PER_CLASS_ACCURACY:
            return (hits.double() / present.clamp(min=1)).float()
        counted = present + predicted > 0 if k == 1 else present > 0
        return (hits.double() / present.clamp(min=1))[counted].mean().float()


def target_rank(scores: Tensor, target: Tensor) -> Tensor:
    """How many classes come before the target: those with a larger score, and lower classes with an equal one.

    Args:
        scores: [B, C].
        target: [B], integers in [0, C).

    Returns:
        int64 [B]. NaN comes before all else, so a target of score NaN is behind all C classes.
    """
    own = scores.gather(1, target[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    return (~(scores <= own) | ((scores == own) & lower)).sum(dim=1)


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Percentage of rows of `output` [B, C] whose `target` [B] is among the k largest, for each k of `topk`."""
    rank = target_rank(output, target)
    return [(rank < k).float().mean() * 100 for k in topk]
