"""What changes over training: learning rate, weight decay, EMA momentum, teacher temperature (2508.10104).

Two generations of configuration: with a top-level `schedules` section each quantity has start, peak, end, warm-up and
optionally a cosine ("v2", constant after its warm-up in the published recipes); without it the `optim` and `teacher`
sections give the cosine schedules of DINOv2 ("v1", 2304.07193).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dinov3.configs import learning_rate_scale
from dinov3.train.cosine_lr_scheduler import CosineScheduler, linear_warmup_cosine_decay


class Schedule:
    """A value per iteration; past the end it keeps the last value (or `after_end`)."""

    def __init__(self, values: np.ndarray, after_end: float | None = None) -> None:
        self.values = np.asarray(values, dtype=np.float64)
        self.after_end = float(self.values[-1]) if after_end is None else float(after_end)

    def __getitem__(self, iteration: int) -> float:
        return float(self.values[iteration]) if iteration < len(self.values) else self.after_end

    def __len__(self) -> int:
        return len(self.values)


@dataclass
class StepSettings:
    """The scheduled values of one iteration."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    last_layer_lr: float


def build_schedulers(cfg: Any) -> tuple[Schedule, Schedule, Schedule, Schedule, Schedule]:
    """Schedules of a run of `optim.epochs` x `train.OFFICIAL_EPOCH_LENGTH` iterations.

    With v1 the learning rate must have been scaled to the batch by `apply_scaling_rules_to_cfg`; v2 scales `lr.peak`
    and `lr.end` here.

    Returns:
        Learning rate, weight decay, EMA momentum, teacher temperature, and the learning rate of the heads' last layers
        (0 while they are frozen), each indexed by iteration.
    """
    return _build_v2(cfg) if cfg.get("schedules") is not None else _build_v1(cfg)


def settings_at(schedules: tuple[Schedule, Schedule, Schedule, Schedule, Schedule], iteration: int) -> StepSettings:
    """The values of all schedules at `iteration`."""
    return StepSettings(*(schedule[iteration] for schedule in schedules))


def apply_optim_scheduler(optimizer: torch.optim.Optimizer, lr: float, wd: float, last_layer_lr: float) -> None:
    """Set each group's learning rate and weight decay from the scheduled values and the group's multipliers."""
    for group in optimizer.param_groups:
        group["weight_decay"] = wd * group["wd_multiplier"]
        group["lr"] = (last_layer_lr if group["is_last_layer"] else lr) * group["lr_multiplier"]


def _build_v2(cfg: Any) -> tuple[Schedule, Schedule, Schedule, Schedule, Schedule]:
    scale = learning_rate_scale(cfg)
    lr_section = cfg.schedules.lr
    lr = _warmup_cosine(cfg, lr_section, peak=lr_section.peak * scale, end=lr_section.end * scale)
    return (
        Schedule(lr),
        Schedule(_warmup_cosine(cfg, cfg.schedules.weight_decay)),
        Schedule(_warmup_cosine(cfg, cfg.schedules.momentum)),
        Schedule(_warmup_cosine(cfg, cfg.schedules.teacher_temp)),
        _freeze_start(Schedule(lr), _iterations(cfg, lr_section.get("freeze_last_layer_epochs") or 0)),
    )


def _warmup_cosine(cfg: Any, section: Any, *, peak: float | None = None, end: float | None = None) -> np.ndarray:
    cosine_epochs = section.get("cosine_epochs")
    return linear_warmup_cosine_decay(
        start=section.start,
        peak=section.peak if peak is None else peak,
        end=section.end if end is None else end,
        warmup_iterations=_iterations(cfg, section.warmup_epochs),
        total_iterations=_iterations(cfg, cfg.optim.epochs),
        cosine_iterations=None if cosine_epochs is None else _iterations(cfg, cosine_epochs),
    )


def _build_v1(cfg: Any) -> tuple[Schedule, Schedule, Schedule, Schedule, Schedule]:
    optim, teacher = cfg.optim, cfg.teacher
    total = _iterations(cfg, optim.epochs)

    def cosine(base: float, final: float, warmup_epochs: float = 0) -> Schedule:
        schedule = CosineScheduler(
            base_value=base,
            final_value=final,
            total_iters=total,
            warmup_iters=_iterations(cfg, warmup_epochs),
            start_warmup_value=0,
            trunc_extra=optim.schedule_trunc_extra,
        )
        return Schedule(schedule.schedule, after_end=final)

    lr = cosine(optim.lr, optim.min_lr, optim.warmup_epochs)
    warmup = _iterations(cfg, teacher.warmup_teacher_temp_epochs)
    temperature = np.full(max(total, warmup), float(teacher.teacher_temp))
    temperature[:warmup] = np.linspace(teacher.warmup_teacher_temp, teacher.teacher_temp, warmup)
    return (
        lr,
        cosine(optim.weight_decay, optim.weight_decay_end),
        cosine(teacher.momentum_teacher, teacher.final_momentum_teacher),
        Schedule(temperature, after_end=teacher.teacher_temp),
        _freeze_start(lr, _iterations(cfg, optim.freeze_last_layer_epochs)),
    )


def _freeze_start(schedule: Schedule, iterations: int) -> Schedule:
    values = schedule.values.copy()
    values[:iterations] = 0.0
    return Schedule(values, after_end=schedule.after_end)


def _iterations(cfg: Any, epochs: float) -> int:
    return round(epochs * cfg.train.OFFICIAL_EPOCH_LENGTH)
