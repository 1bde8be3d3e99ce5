"""Classification metrics: counters that are updated batch by batch and summed over processes."""

from dinov3.eval.classification.metrics.any_match import AnyMatchAccuracy, GroupByAnyMatchAccuracy
from dinov3.eval.classification.metrics.building import (
    build_classification_metric,
    build_topk_accuracy_metric,
    build_topk_any_match_accuracy_metric,
    build_topk_recall_metric,
    check_targets,
    scalar_results,
)
from dinov3.eval.classification.metrics.classification import (
    AveragingMethod,
    ClassificationMetricType,
    TargetKind,
    TopKAccuracy,
    accuracy,
)
from dinov3.eval.classification.metrics.imagenet_c import ImageNet_C_Metric
from dinov3.eval.classification.metrics.multiclass import MacroAveragedMeanReciprocalRank
from dinov3.eval.classification.metrics.multilabel import MeanAveragePrecisionVOC2007

__all__ = [
    "AnyMatchAccuracy",
    "AveragingMethod",
    "ClassificationMetricType",
    "GroupByAnyMatchAccuracy",
    "ImageNet_C_Metric",
    "MacroAveragedMeanReciprocalRank",
    "MeanAveragePrecisionVOC2007",
    "TargetKind",
    "TopKAccuracy",
    "accuracy",
    "build_classification_metric",
    "build_topk_accuracy_metric",
    "build_topk_any_match_accuracy_metric",
    "build_topk_recall_metric",
    "check_targets",
    "scalar_results",
]
