"""What changes over training: learning rate, weight decay, EMA momentum, teacher temperature (2508.10104).

Two generations of configuration: with a top-level `schedules` section each quantity has start, peak, end, warm-up and
optionally a cosine ("v2", constant after its warm-up in the published recipes); without it the `optim` and `teacher`
sections give the cosine schedules of DINOv2 ("v1", 2304.07193). Both are cosine decays with a linear warm-up
(1608.03983). Numbers of iterations may be fractional (a fraction of an epoch) and are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dinov3.configs.scaling import count_iterations, learning_rate_scale


class Schedule:
    """A value per iteration; past the end it keeps the last value (or `after_end`)."""

    def __init__(self, values: NDArray[np.float64] | Sequence[float], after_end: float | None = None) -> None:
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
    """Build the schedules of a run of `optim.epochs` x `train.OFFICIAL_EPOCH_LENGTH` iterations.

    With v1 the learning rate must have been scaled to the batch by `apply_scaling_rules_to_cfg`; v2 scales `lr.peak`
    and `lr.end` here.

    Returns:
        Learning rate, weight decay, EMA momentum, teacher temperature, and the learning rate of the heads' last layers
        (0 while they are frozen), each indexed by iteration.
    """
    if cfg.get("schedules") is None:
        return _build_v1(cfg)
    sections, scale = cfg.schedules, learning_rate_scale(cfg)
    lr = warmup_cosine(cfg, sections.lr, scale=scale)
    return (
        lr,
        warmup_cosine(cfg, sections.weight_decay),
        warmup_cosine(cfg, sections.momentum),
        warmup_cosine(cfg, sections.teacher_temp),
        _freeze_start(lr, count_iterations(cfg, sections.lr.get("freeze_last_layer_epochs") or 0)),
    )


def warmup_cosine(cfg: Any, section: Any, *, scale: float = 1) -> Schedule:
    """Build the schedule of a section with `start`, `peak`, `end`, `warmup_epochs` and perhaps `cosine_epochs`.

    Args:
        cfg: the training configuration, for the length of the run.
        section: e.g. `cfg.schedules.momentum`.
        scale: multiplies peak and end, but not start, as published.
    """
    cosine_epochs = section.get("cosine_epochs")
    return Schedule(
        linear_warmup_cosine_decay(
            start=section.start,
            peak=section.peak * scale,
            end=section.end * scale,
            warmup_iterations=count_iterations(cfg, section.warmup_epochs),
            total_iterations=count_iterations(cfg, cfg.optim.epochs),
            cosine_iterations=None if cosine_epochs is None else count_iterations(cfg, cosine_epochs),
        )
    )


def settings_at(schedules: tuple[Schedule, Schedule, Schedule, Schedule, Schedule], iteration: int) -> StepSettings:
    """Return the values of all schedules at `iteration`."""
    return StepSettings(*(schedule[iteration] for schedule in schedules))


def apply_optim_scheduler(optimizer: torch.optim.Optimizer, lr: float, wd: float, last_layer_lr: float) -> None:
    """Set each group's learning rate and weight decay from the scheduled values and the group's multipliers."""
    for group in optimizer.param_groups:
        group["weight_decay"] = wd * group["wd_multiplier"]
        group["lr"] = (last_layer_lr if group["is_last_layer"] else lr) * group["lr_multiplier"]


def _build_v1(cfg: Any) -> tuple[Schedule, Schedule, Schedule, Schedule, Schedule]:
    optim, teacher = cfg.optim, cfg.teacher
    total = count_iterations(cfg, optim.epochs)

    def cosine(base: float, final: float, warmup_epochs: float = 0) -> Schedule:
        return CosineScheduler(
            base_value=base,
            final_value=final,
            total_iters=total,
            warmup_iters=count_iterations(cfg, warmup_epochs),
            trunc_extra=optim.schedule_trunc_extra,
        )

    lr = cosine(optim.lr, optim.min_lr, optim.warmup_epochs)
    warmup = count_iterations(cfg, teacher.warmup_teacher_temp_epochs)
    temperature = np.full(max(total, warmup), float(teacher.teacher_temp))
    temperature[:warmup] = np.linspace(teacher.warmup_teacher_temp, teacher.teacher_temp, warmup)
    return (
        lr,
        cosine(optim.weight_decay, optim.weight_decay_end),
        cosine(teacher.momentum_teacher, teacher.final_momentum_teacher),
        Schedule(temperature, after_end=teacher.teacher_temp),
        _freeze_start(lr, count_iterations(cfg, optim.freeze_last_layer_epochs)),
    )


def _freeze_start(schedule: Schedule, iterations: int) -> Schedule:
    values = schedule.values.copy()
    values[:iterations] = 0.0
    return Schedule(values, after_end=schedule.after_end)


class CosineScheduler(Schedule):
    """DINOv2's form: a frozen start, a linear warm-up and a cosine; afterwards the final value.

    `schedule` is the float64 array of the first `total_iters` values.

    Args:
        base_value: value after the warm-up.
        final_value: value that the cosine approaches.
        total_iters: length, in iterations, with freeze and warm-up.
        warmup_iters: length of the linear part, which contains both of its ends.
        start_warmup_value: where the linear part starts.
        freeze_iters: number of zeros at the start.
        trunc_extra: > 0 cuts the end of a cosine that is longer by this fraction, and stretches the rest so that it
            still ends at `final_value`, which is then reached at the last iteration.

    Raises:
        ValueError: freeze and warm-up are longer than the whole.
    """

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: float,
        warmup_iters: float = 0,
        start_warmup_value: float = 0,
        freeze_iters: float = 0,
        trunc_extra: float = 0.0,
    ) -> None:
        total, warmup, freeze = round(total_iters), round(warmup_iters), round(freeze_iters)
        remaining = total - warmup - freeze
        if remaining < 0:
            raise ValueError(
                f"a schedule of {total} iterations cannot hold {freeze} frozen and {warmup} warm-up "
                "iterations: train longer or warm up for fewer epochs"
            )
        self.schedule: NDArray[np.float64] = np.concatenate(
            [
                np.zeros(freeze),
                np.linspace(start_warmup_value, base_value, warmup),
                final_value + (base_value - final_value) * _falling_cosine(remaining, trunc_extra),
            ]
        )
        super().__init__(self.schedule, after_end=final_value)


def linear_warmup_cosine_decay(
    start: float,
    peak: float,
    end: float,
    warmup_iterations: float,
    total_iterations: float,
    cosine_iterations: float | None = None,
) -> NDArray[np.float64]:
    """Return DINOv3's form: a linear warm-up, a cosine from `peak` to `end`, and `end` for the rest.

    Args:
        start: first value of the warm-up.
        peak: value that the warm-up approaches (it does not contain it) and the cosine starts with.
        end: value that the cosine ends with; may be higher than `peak`.
        warmup_iterations: length of the warm-up.
        total_iterations: length of the result.
        cosine_iterations: length of the cosine; 0 gives a step to `end`. Default: everything after the warm-up.

    Returns:
        float64 array of `total_iterations` values. Past its end the last value holds: the caller clamps the index.

    Raises:
        ValueError: warm-up and cosine are longer than the whole.
    """
    warmup, total = round(warmup_iterations), round(total_iterations)
    cosine = total - warmup if cosine_iterations is None else round(cosine_iterations)
    if min(warmup, cosine) < 0 or warmup + cosine > total:
        raise ValueError(
            f"a schedule of {total} iterations cannot hold {warmup} warm-up and {cosine} cosine iterations: "
            "train longer, or shorten schedules' warmup_epochs or cosine_epochs"
        )
    return np.concatenate(
        [
            np.linspace(start, peak, warmup, endpoint=False),
            end + 0.5 * (peak - end) * (1 + np.cos(np.linspace(0, np.pi, cosine))),
            np.full(total - warmup - cosine, float(end)),
        ]
    )


def _falling_cosine(n: int, trunc_extra: float) -> NDArray[np.float64]:
    # n values, from 1 towards 0
    if trunc_extra == 0:
        return 0.5 * (1 + np.cos(np.pi * np.arange(n) / n))
    if n < 2:
        return np.zeros(n)
    cosine = 0.5 * (1 + np.cos(np.linspace(0, np.pi, int((1 + trunc_extra) * n))[:n]))
    return (cosine - cosine[-1]) / (1 - cosine[-1])
