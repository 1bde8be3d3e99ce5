"""Learning-rate schedules of heads on frozen backbones: torch's own, and two with a warm-up, chosen by name."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from dinov3.eval.training.config import OptimizerConfig, SchedulerConfig
from dinov3.utils.messages import did_you_mean

logger = logging.getLogger("dinov3")

TORCH_SCHEDULERS = ("ConstantLR", "LinearLR", "MultiStepLR", "PolynomialLR", "StepLR", "OneCycleLR")

#: A peak for all parameter groups, one for each (None: the group's own rate), or None: each group's own rate.
MaxLr = float | Sequence[float | None] | None


def annealing_cos(start: float, end: float, pct: float) -> float:
    """Follow half a cosine from `start` (at `pct` 0) to `end` (at 1)."""
    return end + (start - end) * (1.0 + math.cos(math.pi * pct)) / 2.0


def annealing_linear(start: float, end: float, pct: float) -> float:
    """Follow a line from `start` (at `pct` 0) to `end` (at 1)."""
    return start + (end - start) * pct


class WarmupOneCycleLR(LRScheduler):
    """A linear warm-up times a cosine (or line) that falls from the first step on; beta1 or momentum rises after it.

    So the largest rate is not `max_lr` but what the annealing has left of it when the warm-up ends: 0.75 `max_lr` in
    the NYU recipe. The formulas are those that the published heads were trained with.

    Args:
        optimizer: whose rates are set.
        total_steps: T; `step` may be called this often.
        warmup_iters: W, steps of the warm-up, less than T.
        warmup_ratio: the share of the peak at which the warm-up begins; it is then multiplied with a line that falls
            to 0 at T. 0: it begins at `max_lr / final_div_factor` and is multiplied with a cosine.
        pct_start: has no effect; published configurations contain it.
        max_lr: X, the rate that the annealing starts from.
        anneal_strategy: "cos" or "linear".
        base_momentum: beta1 or momentum right after the warm-up.
        max_momentum: beta1 or momentum at T.
        div_factor: the last rate is X / (div_factor * final_div_factor).
        final_div_factor: F; infinite: the last rate is 0.
        use_beta1: set the first of each group's `betas`.
        update_momentum: without `use_beta1`, set each group's `momentum`.

    Raises:
        ValueError: the warm-up does not end before T, a setting is out of range, or `use_beta1` is set for an optimizer
            without betas.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_iters: int = 0,
        warmup_ratio: float = 0.0,
        pct_start: float = 0.295,
        max_lr: MaxLr = None,
        anneal_strategy: str = "cos",
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1000.0,
        use_beta1: bool = True,
        update_momentum: bool = True,
    ) -> None:
        _check_warmup(type(self).__name__, total_steps, warmup_iters)
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(f"anneal_strategy={anneal_strategy!r}: expected 'cos' or 'linear'")
        if not (float(div_factor) > 0 and float(final_div_factor) > 0):
            raise ValueError(f"div_factor={div_factor} and final_div_factor={final_div_factor} must be greater than 0")
        if use_beta1 and any("betas" not in group for group in optimizer.param_groups):
            raise ValueError(f"use_beta1=True, but {type(optimizer).__name__} has no betas: set use_beta1=False")
        self.total_steps = int(total_steps)
        self.warmup_iters = int(warmup_iters)
        self.warmup_ratio = float(warmup_ratio)
        self.anneal_strategy = anneal_strategy
        self.base_momentum = float(base_momentum)
        self.max_momentum = float(max_momentum)
        self.div_factor = float(div_factor)
        self.final_div_factor = float(final_div_factor)
        self.use_beta1 = bool(use_beta1)
        self.update_momentum = bool(update_momentum)
        self.max_lrs = _peaks(optimizer, max_lr)
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        """Set the rates and momenta of the next step; a ValueError after T of them."""
        if (self.last_epoch + 1 if epoch is None else epoch) > self.total_steps:
            raise ValueError(
                f"a schedule of total_steps={self.total_steps} was stepped once more: a longer training needs one that "
                "is built for its length"
            )
        super().step(epoch)
        # None in the warm-up: the published NYU heads were trained so, for a third of the steps. use_beta1=False with
        # update_momentum=False leaves the optimizer's own momentum as it is.
        momentum = 0.0
        if self.last_epoch >= self.warmup_iters:
            annealing = annealing_cos if self.anneal_strategy == "cos" else annealing_linear
            done = (self.last_epoch - self.warmup_iters) / (self.total_steps - self.warmup_iters)
            momentum = annealing(self.base_momentum, self.max_momentum, done)
        for group in self.optimizer.param_groups:
            if self.use_beta1:
                group["betas"] = (momentum, *group["betas"][1:])
            elif self.update_momentum:
                group["momentum"] = momentum

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each group after as many steps as were made."""
        return [self._rate(self.last_epoch, peak) for peak in self.max_lrs]

    def _rate(self, step: int, peak: float) -> float:
        progress = step / self.total_steps
        if step < self.warmup_iters:
            warm = step / self.warmup_iters
            if self.warmup_ratio > 0:
                return peak * (1 - (1 - warm) * (1 - self.warmup_ratio)) * (1 - progress)
            return peak / self.final_div_factor + annealing_cos(peak, 0.0, progress) * warm
        last = peak / (self.div_factor * self.final_div_factor)
        if self.anneal_strategy == "cos":
            # One step ahead of the line below, as published: the last step has the last rate.
            return annealing_cos(peak, last, (step + 1) / self.total_steps)
        return annealing_linear(peak, last, progress)


class WarmupMultiStepLR(LRScheduler):
    """A linear warm-up to the peak, then a factor at each milestone; after the last one the rate stays.

    Args:
        optimizer: whose rates are set.
        total_steps: T.
        milestones: shares of T at which the rate is multiplied. At most one counts per step, and none in the warm-up.
        gamma: the factor.
        warmup_iters: W, steps of the warm-up, less than T.
        max_lr: the peak.

    Raises:
        ValueError: the warm-up does not end before T.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        milestones: Sequence[float] = (0.5, 0.9, 1.0),
        gamma: float = 0.1,
        warmup_iters: int = 0,
        max_lr: MaxLr = None,
    ) -> None:
        _check_warmup(type(self).__name__, total_steps, warmup_iters)
        self.warmup_iters = int(warmup_iters)
        self.gamma = float(gamma)
        self.passing_steps: list[int] = []
        earliest = max(self.warmup_iters, 1)
        for milestone in milestones:
            self.passing_steps.append(max(math.ceil(int(total_steps) * float(milestone)), earliest))
            earliest = self.passing_steps[-1] + 1
        self.max_lrs = _peaks(optimizer, max_lr)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each group after as many steps as were made."""
        count = self.last_epoch + 1
        if count < self.warmup_iters:
            return [peak * count / self.warmup_iters for peak in self.max_lrs]
        passed = sum(step <= count for step in self.passing_steps)
        return [peak * self.gamma**passed for peak in self.max_lrs]


SCHEDULERS: dict[str, type[LRScheduler]] = {
    **{name: getattr(lr_scheduler, name) for name in TORCH_SCHEDULERS},
    "WarmupOneCycleLR": WarmupOneCycleLR,
    "WarmupMultiStepLR": WarmupMultiStepLR,
}


def build_scheduler(
    scheduler_type: str,
    optimizer: Optimizer,
    lr: float | None,
    total_iter: int,
    constructor_kwargs: Mapping[str, Any] | None = None,
) -> LRScheduler:
    """Build a schedule by name.

    Args:
        scheduler_type: a name in `SCHEDULERS`.
        optimizer: whose rates are set.
        lr: the peak (`max_lr`) of the types that have one; None: each group's own rate.
        total_iter: length of the training: `total_steps` or `total_iters` of the types that have one.
        constructor_kwargs: further arguments of the type, which win over those above. Arguments that the type does not
            know are left out with a warning.

    Returns:
        The schedule, with the rates of the first step already set.

    Raises:
        ValueError: there is no such type, it lacks an argument, or its settings contradict each other.
    """
    if scheduler_type not in SCHEDULERS:
        suggestion = did_you_mean(scheduler_type, SCHEDULERS)
        raise ValueError(
            f"there is no scheduler type {scheduler_type!r}{suggestion}; expected one of {', '.join(SCHEDULERS)}"
        )
    scheduler = SCHEDULERS[scheduler_type]
    parameters = {n: p for n, p in inspect.signature(scheduler).parameters.items() if n != "optimizer"}
    peaks = lr if lr is not None else [float(group["lr"]) for group in optimizer.param_groups]
    derived = {"max_lr": peaks, "total_steps": total_iter, "total_iters": total_iter}
    kwargs: dict[str, Any] = {name: value for name, value in derived.items() if name in parameters}
    for name, value in (constructor_kwargs or {}).items():
        if name in parameters:
            # Lists of OmegaConf would not survive in a checkpoint.
            kwargs[name] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        else:
            logger.warning(
                f"{name}={value!r} has no effect, because {scheduler_type} does not know it"
                f"{did_you_mean(name, parameters)}; it takes {', '.join(parameters)}"
            )
    needed = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    if missing := [name for name in needed if name not in kwargs]:
        raise ValueError(f"{scheduler_type} needs {', '.join(missing)}: give it in scheduler.constructor_kwargs")
    return scheduler(optimizer, **kwargs)


def build_adamw(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, schedule: SchedulerConfig
) -> tuple[AdamW, LRScheduler]:
    """Build AdamW and its schedule from the sections `optimizer` and `scheduler` of a configuration."""
    optimizer = AdamW(parameters, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
    return optimizer, build_scheduler(
        schedule.type, optimizer, config.lr, schedule.total_iter, schedule.constructor_kwargs
    )


def _check_warmup(name: str, total_steps: int, warmup_iters: int) -> None:
    if not 0 <= warmup_iters < total_steps:
        raise ValueError(
            f"{name}: warmup_iters={warmup_iters} of total_steps={total_steps}: the warm-up must be shorter than the "
            "training"
        )


def _peaks(optimizer: Optimizer, max_lr: MaxLr) -> list[float]:
    groups = optimizer.param_groups
    given = list(max_lr) if isinstance(max_lr, Sequence) else [max_lr] * len(groups)
    if len(given) > len(groups):
        raise ValueError(f"max_lr has {len(given)} rates for an optimizer of {len(groups)} parameter groups")
    given += [None] * (len(groups) - len(given))
    return [float(group["lr"] if peak is None else peak) for group, peak in zip(groups, given, strict=True)]
