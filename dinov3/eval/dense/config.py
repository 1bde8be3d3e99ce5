"""Parts of a configuration that dense tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from omegaconf import MISSING

from dinov3.configs.settings import key, settings_of


class Dtype(Enum):
    """The precision that a model runs in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def autocast_dtype(self) -> torch.dtype:
        """The torch dtype."""
        return torch.float32 if self is Dtype.FLOAT32 else torch.bfloat16


@dataclass
class SchedulerConfig:
    """How the learning rate changes."""

    type: str = key("WarmupOneCycleLR", "WarmupOneCycleLR, WarmupMultiStepLR, or a scheduler of torch")
    total_iter: int = key(38400, "number of steps", minimum=1)
    constructor_kwargs: dict[str, Any] = key({}, "further arguments of the scheduler, e.g. warmup_iters")


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = key(1e-4, "peak of the learning rate", minimum=0)
    beta1: float = key(0.9, "decay of the first moment; the scheduler may change it")
    beta2: float = key(0.999, "decay of the second moment")
    weight_decay: float = key(0.01, "weight decay", minimum=0)
    gradient_clip: float = key(35.0, "largest norm of the gradient; inf: any", above=0)


@dataclass
class DatasetsConfig:
    """The images; `root` is added to dataset strings that have none."""

    root: str = key(MISSING, "directory of the datasets, e.g. that of nyu_train.txt or ADE20K_object150_train.txt")
    train: str = key("", "dataset string, e.g. NYU:split=TRAIN, DepthFolder:split=train or ADE20K:split=TRAIN")
    val: str = key("", "dataset string, for validation during training")


def check_declared(config: Any) -> None:
    """Refuse settings outside of the choices and ranges with which they are declared.

    Args:
        config: a dataclass whose fields were made by `key`.

    Raises:
        ValueError: names the key.
    """
    config_class: Any = type(config)
    for name, setting in settings_of(config_class).items():
        value = config
        for part in name.split("."):
            value = getattr(value, part, None)  # None below a section that is null
        value = list(value) if isinstance(value, tuple) else value
        problem = setting.value_problem(value) if setting.choices else None
        if value is not None and (problem := problem or setting.range_problem(value)):
            raise ValueError(problem)


def check_image_size(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is the short side in pixels, [height, width], or None."""
    sides = value if isinstance(value, list | tuple) else [value]
    is_size = len(sides) in (1, 2) and all(isinstance(side, int) and side >= 1 for side in sides)
    if value is not None and not is_size:
        raise ValueError(f"{name}={value!r}: expected the short side in pixels, [height, width], or null")


def check_factors(name: str, factors: Sequence[float] | None) -> None:
    """Raise a ValueError if two factors fall."""
    if factors is not None and factors[0] > factors[1]:
        raise ValueError(f"{name}={list(factors)}: expected the smallest factor, then the largest")
