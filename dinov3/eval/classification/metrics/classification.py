"""Which classification metrics there are, what targets they take, and how they are built."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from dinov3.eval.classification.metrics.counting import (
    AnyMatchAccuracy,
    GroupByAnyMatchAccuracy,
    MacroAveragedMeanReciprocalRank,
    MulticlassF1,
    MultilabelF1,
    TopKAccuracy,
)
from dinov3.eval.classification.metrics.curves import MacroAUROC, MacroAveragePrecision, MeanAveragePrecisionVOC2007
from dinov3.eval.classification.metrics.imagenet_c import CORRUPTION_TYPES, ImageNet_C_Metric

MIN_CLASSES_FOR_TOP_5 = 5
CORRUPTION_COLUMNS = 3


class AveragingMethod(Enum):
    """How samples become one number: each sample counts the same, or each class does; or one number for each class."""

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
        """How this metric averages; None if there is only one way."""
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
        """Whether the release counts it among the multi-label metrics; `target_kind` says what targets it takes."""
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


def build_classification_metric(
    metric_type: ClassificationMetricType, *, num_classes: int, ks: Sequence[int] | None = None, dataset: Any = None
) -> Any:
    """Build the metric of a type.

    Args:
        metric_type: what to report.
        num_classes: number of score columns.
        ks: values of k of a top-k metric. Default: (1, 5), or (1,) below five classes.
        dataset: for `GROUPBY_...`, has `get_groupby_labels()` and `get_mapped_targets()`; for `IMAGENET_C_METRIC`, may
            have `corruption_types`.

    Returns:
        An object with `update(preds, target)`, `compute() -> {"top-<k>": fraction}`, `reset()` and `clone()`.

    Raises:
        ValueError: the dataset does not have what the metric needs.
    """
    name = metric_type.name
    average = "" if metric_type.averaging_method is None else metric_type.averaging_method.value
    ks = ks or ((1, 5) if num_classes >= MIN_CLASSES_FOR_TOP_5 else (1,))
    if metric_type.is_topk_accuracy or metric_type.is_topk_recall:
        # With one class per sample, the share of a class's samples that are found is its accuracy and its recall.
        return TopKAccuracy(num_classes, ks, average)
    if metric_type.target_kind is TargetKind.LISTS:
        return AnyMatchAccuracy(ks)
    if metric_type.target_kind is TargetKind.INDICES:
        if not hasattr(dataset, "get_groupby_labels") or not hasattr(dataset, "get_mapped_targets"):
            raise ValueError(f"{name} needs {metric_type.target_kind.value}; {type(dataset).__name__} do not")
        return GroupByAnyMatchAccuracy(int(name[-1]), dataset.get_groupby_labels(), dataset.get_mapped_targets())
    if metric_type.target_kind is TargetKind.CORRUPTIONS:
        return ImageNet_C_Metric(getattr(dataset, "corruption_types", CORRUPTION_TYPES))
    if "F1" in name:
        return (MultilabelF1 if metric_type.is_multilabel else MulticlassF1)(num_classes, average)
    others: dict[str, type[Any]] = {
        "AUROC": MacroAUROC,
        "MACRO_AVERAGED_MEAN_RECIPROCAL_RANK": MacroAveragedMeanReciprocalRank,
        "MEAN_AVERAGE_PRECISION_VOC_2007": MeanAveragePrecisionVOC2007,
        "MACRO_MULTILABEL_AVERAGE_PRECISION": MacroAveragePrecision,
    }
    return others[name](num_classes)


def scalar_results(metric: Any, values: dict[str, Tensor]) -> dict[str, float]:
    """Turn the values of a metric into numbers; every process must call it.

    Args:
        metric: that gave them.
        values: as returned by `metric.compute()`.

    Returns:
        The same, with a value for each class replaced by the mean over the classes that are present.
    """
    vectors = [name for name, value in values.items() if value.ndim]
    present = metric.present() if vectors else torch.empty(0)
    return {name: float(value[present].mean() if name in vectors else value) for name, value in values.items()}


def check_targets(metric_type: ClassificationMetricType, labels: Tensor, name: str) -> None:
    """Refuse targets that a metric cannot take, before anything is computed.

    Args:
        metric_type: the metric.
        labels: of the dataset, [N] or [N, L].
        name: what the message calls the dataset.

    Raises:
        ValueError: says what the metric needs.
    """
    kind = metric_type.target_kind
    n_dims = {TargetKind.CLASSES: 1, TargetKind.MULTI_HOT: 2, TargetKind.CORRUPTIONS: 2}.get(kind)
    if n_dims is None:
        return
    if labels.ndim != n_dims or (kind is TargetKind.CORRUPTIONS and labels.shape[1] != CORRUPTION_COLUMNS):
        have = "one class per image" if labels.ndim == 1 else f"rows of {labels.shape[1]}"
        raise ValueError(f"{metric_type.name} needs {kind.value}, but {name} has {have}")
