"""Learning rates of segmentation heads: the schedules of `dinov3.eval.training.schedulers`.

Notable: as published, the peak of `WarmupOneCycleLR` is the rate of each parameter group, whatever `lr` is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dinov3.eval.training import schedulers
from dinov3.eval.training.schedulers import WarmupOneCycleLR

__all__ = ["WarmupOneCycleLR", "build_scheduler"]

logger = logging.getLogger("dinov3")


def build_scheduler(
    scheduler_type: str,
    optimizer: Optimizer,
    lr: float | None,
    total_iter: int,
    constructor_kwargs: Mapping[str, Any] | None = None,
) -> LRScheduler:
    """As `dinov3.eval.training.schedulers.build_scheduler`, but for the peak of `WarmupOneCycleLR`."""
    if scheduler_type != WarmupOneCycleLR.__name__:
        return schedulers.build_scheduler(scheduler_type, optimizer, lr, total_iter, constructor_kwargs)
    kwargs = dict(constructor_kwargs or {})
    if (peak := kwargs.pop("max_lr", None)) is not None:
        logger.warning(f"max_lr={peak} has no effect: the peak is the rate of each parameter group, here optimizer.lr")
    return schedulers.build_scheduler(scheduler_type, optimizer, None, total_iter, kwargs)
