"""Classification metrics: counters that are updated batch by batch and summed over processes."""

from dinov3.eval.classification.metrics.classification import (
    AveragingMethod,
    ClassificationMetricType,
    TargetKind,
    build_classification_metric,
    check_targets,
    scalar_results,
)
from dinov3.eval.classification.metrics.counting import accuracy

__all__ = [
    "AveragingMethod",
    "ClassificationMetricType",
    "TargetKind",
    "accuracy",
    "build_classification_metric",
    "check_targets",
    "scalar_results",
]
