from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from dinov3.eval.segmentation.schedulers import build_scheduler


def adamw(*rates: float) -> torch.optim.AdamW:
    return torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def test_each_group_has_its_own_peak_whatever_lr_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        scheduler: Any = build_scheduler("WarmupOneCycleLR", adamw(0.1, 0.2), 0.4, 20, {"max_lr": 0.8})
    assert scheduler.max_lrs == [0.1, 0.2]
    assert "max_lr=0.8 has no effect" in caplog.text


def test_other_schedules_are_those_of_dense_tasks() -> None:
    scheduler: Any = build_scheduler("OneCycleLR", adamw(0.1), 0.4, 20)
    assert scheduler.total_steps == 20 and scheduler.optimizer.param_groups[0]["max_lr"] == 0.4
