"""Classification metrics: counters that are updated batch by batch and summed over processes."""

from dinov3.eval.metrics.classification import (
    AveragingMethod,
    ClassificationMetricType,
    TopKAccuracy,
    accuracy,
    build_classification_metric,
    build_topk_accuracy_metric,
)

__all__ = [
    "AveragingMethod",
    "ClassificationMetricType",
    "TopKAccuracy",
    "accuracy",
    "build_classification_metric",
    "build_topk_accuracy_metric",
]
