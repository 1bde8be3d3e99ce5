"""From the type of a metric to the metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinov3.eval.classification.metrics.any_match import AnyMatchAccuracy, GroupByAnyMatchAccuracy
from dinov3.eval.classification.metrics.classification import (
    AveragingMethod,
    ClassificationMetricType,
    TargetKind,
    TopKAccuracy,
)
from dinov3.eval.classification.metrics.imagenet_c import CORRUPTION_TYPES, ImageNet_C_Metric
from dinov3.eval.classification.metrics.multiclass import MacroAUROC, MacroAveragedMeanReciprocalRank, MulticlassF1
from dinov3.eval.classification.metrics.multilabel import (
    MacroAveragePrecision,
    MeanAveragePrecisionVOC2007,
    MultilabelF1,
)

MIN_CLASSES_FOR_TOP_5 = 5
CORRUPTION_COLUMNS = 3


def build_classification_metric(
    metric_type: ClassificationMetricType, *, num_classes: int, ks: Sequence[int] | None = None, dataset: Any = None
) -> Any:
    """The metric of a type.

    Args:
        metric_type: what to report.
        num_classes: number of score columns.
        ks: top-k values, where there are such; (1, 5) by default, or (1,) below five classes.
        dataset: for `GROUPBY_...`: has `get_groupby_labels()` and `get_mapped_targets()`; for `IMAGENET_C_METRIC` it
            may have `corruption_types`.

    Returns:
        An object with `update(preds, target)`, `compute() -> {"top-<k>": fraction}`, `reset()` and `clone()`.

    Raises:
        ValueError: the dataset does not have what the metric needs.
    """
    name, average = metric_type.name, metric_type.averaging_method
    if metric_type.is_topk_accuracy or metric_type.is_topk_recall:
        assert average is not None
        return build_topk_accuracy_metric(average, num_classes, ks)
    if metric_type.target_kind is TargetKind.LISTS:
        return build_topk_any_match_accuracy_metric(num_classes, ks)
    if metric_type.target_kind is TargetKind.INDICES:
        if not hasattr(dataset, "get_groupby_labels") or not hasattr(dataset, "get_mapped_targets"):
            raise ValueError(f"{name} needs {metric_type.target_kind.value}; {type(dataset).__name__} do not")
        return GroupByAnyMatchAccuracy(int(name[-1]), dataset.get_groupby_labels(), dataset.get_mapped_targets())
    if metric_type.target_kind is TargetKind.CORRUPTIONS:
        return ImageNet_C_Metric(getattr(dataset, "corruption_types", CORRUPTION_TYPES))
    if "F1" in name:
        assert average is not None
        return (MultilabelF1 if metric_type.is_multilabel else MulticlassF1)(num_classes, average)
    curves = {
        "AUROC": MacroAUROC,
        "MACRO_AVERAGED_MEAN_RECIPROCAL_RANK": MacroAveragedMeanReciprocalRank,
        "MEAN_AVERAGE_PRECISION_VOC_2007": MeanAveragePrecisionVOC2007,
        "MACRO_MULTILABEL_AVERAGE_PRECISION": MacroAveragePrecision,
    }
    return curves[name](num_classes)


def build_topk_accuracy_metric(
    average_type: AveragingMethod, num_classes: int, ks: Sequence[int] | None = None
) -> TopKAccuracy:
    """A `TopKAccuracy`; `ks` is (1, 5) by default, or (1,) below five classes."""
    return TopKAccuracy(num_classes, ks or _default_ks(num_classes), average_type)


#: With one class per sample, the share of a class's samples that are found is its accuracy.
build_topk_recall_metric = build_topk_accuracy_metric


def build_topk_any_match_accuracy_metric(num_classes: int, ks: Sequence[int] | None = None) -> AnyMatchAccuracy:
    """An `AnyMatchAccuracy`; `ks` as for `build_topk_accuracy_metric`."""
    return AnyMatchAccuracy(ks or _default_ks(num_classes))


def scalar_results(metric: Any, values: dict[str, Tensor]) -> dict[str, float]:
    """The values of a metric as numbers; every process must call it.

    Args:
        metric: that gave them.
        values: of `metric.compute()`.

    Returns:
        The same, where the values of all classes have become the mean over those that are present.
    """
    vectors = [name for name, value in values.items() if value.ndim]
    present = metric.present() if vectors else torch.empty(0)
    return {name: float(value[present].mean() if name in vectors else value) for name, value in values.items()}


def check_targets(metric_type: ClassificationMetricType, labels: Tensor | None, name: str) -> None:
    """Refuse targets that a metric cannot take, before anything is computed.

    Args:
        metric_type: the metric.
        labels: of the dataset, [N] or [N, L]; None if they are not known without the images.
        name: what the message calls the dataset.

    Raises:
        ValueError: says what the metric needs.
    """
    kind = metric_type.target_kind
    n_dims = {TargetKind.CLASSES: 1, TargetKind.MULTI_HOT: 2, TargetKind.CORRUPTIONS: 2}.get(kind)
    if labels is None or n_dims is None:
        return
    if labels.ndim != n_dims or (kind is TargetKind.CORRUPTIONS and labels.shape[1] != CORRUPTION_COLUMNS):
        have = "one class per image" if labels.ndim == 1 else f"rows of {labels.shape[1]}"
        raise ValueError(f"{metric_type.name} needs {kind.value}, but {name} has {have}")


def _default_ks(num_classes: int) -> tuple[int, ...]:
    return (1, 5) if num_classes >= MIN_CLASSES_FOR_TOP_5 else (1,)
