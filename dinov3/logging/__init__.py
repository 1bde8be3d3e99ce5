"""Log messages and training metrics."""

from __future__ import annotations

from dinov3.logging.metric_logger import MetricLogger, truncate_metrics_file
from dinov3.logging.setup import cleanup_logging, setup_logging
from dinov3.logging.smoothed_value import SmoothedValue

__all__ = ["MetricLogger", "SmoothedValue", "cleanup_logging", "setup_logging", "truncate_metrics_file"]
