"""Numbers that follow from a configuration: iterations of epochs, and how the learning rate grows with the batch."""

from __future__ import annotations

import logging
import math
from typing import Any

from dinov3 import distributed
from dinov3.configs.settings import ConfigError
from dinov3.configs.training_config import SETTINGS

logger = logging.getLogger("dinov3")


def count_iterations(cfg: Any, epochs: float) -> int:
    """Return the number of iterations of so many epochs, which may be a fraction."""
    return round(epochs * cfg.train.OFFICIAL_EPOCH_LENGTH)


def learning_rate_scale(cfg: Any, world_size: int | None = None) -> float:
    """Return the factor by which `optim.scaling_rule` multiplies learning rates.

    Args:
        world_size: number of processes. Default: those of this job (1 without a process group).

    Returns:
        With B = `train.batch_size_per_gpu` x processes x `train.grad_accumulation_steps`, the images of a step: B/256
        for `linear_wrt_256`, 4*sqrt(B/1024) for `sqrt_wrt_1024` (both are 4 at 1024 images), 1 for `none`.

    Raises:
        ConfigError: unknown rule.
    """
    n_processes = distributed.get_world_size() if world_size is None else world_size
    batch_size = cfg.train.batch_size_per_gpu * n_processes * cfg.train.grad_accumulation_steps
    rule = cfg.optim.scaling_rule
    if problem := SETTINGS["optim.scaling_rule"].value_problem(rule):
        raise ConfigError(problem)
    if rule == "linear_wrt_256":
        return batch_size / 256
    if rule == "sqrt_wrt_1024":
        return 4 * math.sqrt(batch_size / 1024)
    return 1.0


def apply_scaling_rules_to_cfg(cfg: Any) -> Any:
    """Multiply `optim.lr` by `learning_rate_scale`, in place; returns `cfg`.

    A configuration with a section `schedules` stays as it is: there `lr.peak` and `lr.end` are multiplied when the
    schedules are built.

    Raises:
        ConfigError: unknown rule.
    """
    scale = learning_rate_scale(cfg)
    if cfg.get("schedules") is not None:
        return cfg
    base = cfg.optim.lr
    cfg.optim.lr = base * scale
    logger.info("learning rate %.6g = %.6g x %.6g (%s)", cfg.optim.lr, base, scale, cfg.optim.scaling_rule)
    return cfg
