"""Parts of training a segmentation head that need no images."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from dinov3.eval.segmentation.config import SegmentationConfig, SegmentationSchedulerConfig
from dinov3.eval.segmentation.train import build_optimizer


@pytest.mark.parametrize("scheduler_type, peak", [("WarmupOneCycleLR", 1e-3), ("WarmupMultiStepLR", 0.8)])
def test_the_peak_of_the_published_schedule_is_the_rate_of_the_optimizer(
    scheduler_type: str, peak: float, caplog: pytest.LogCaptureFixture
) -> None:
    config = SegmentationConfig()
    config.scheduler = SegmentationSchedulerConfig(type=scheduler_type, constructor_kwargs={"max_lr": 0.8})
    model: Any = SimpleNamespace(segmentation_model=[nn.Identity(), nn.Linear(1, 1)])
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        _, scheduler = build_optimizer(model, config)
    assert scheduler.max_lrs == [peak]  # type: ignore[attr-defined]
    assert ("max_lr=0.8 has no effect" in caplog.text) == (peak == config.optimizer.lr)
