"""Parts of a configuration that dense tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from omegaconf import MISSING

from dinov3.configs.settings import key


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
    """How the rate of a training changes."""

    type: str = key("WarmupOneCycleLR", "WarmupOneCycleLR, WarmupMultiStepLR, or a scheduler of torch")
    total_iter: int = key(38400, "number of steps")
    constructor_kwargs: dict[str, Any] = key({}, "further arguments of the scheduler, e.g. warmup_iters")


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = key(1e-4, "peak of the learning rate")
    beta1: float = key(0.9, "decay of the first moment; the scheduler may change it")
    beta2: float = key(0.999, "decay of the second moment")
    weight_decay: float = key(0.01, "weight decay")
    gradient_clip: float = key(35.0, "largest norm of the gradient; inf: any")


@dataclass
class DatasetsConfig:
    """The images; `root` is added to dataset strings that have none."""

    root: str = key(MISSING, "directory of the datasets, e.g. that of nyu_train.txt or ADE20K_object150_train.txt")
    train: str = key("", "dataset string, e.g. NYU:split=TRAIN, DepthFolder:split=train or ADE20K:split=TRAIN")
    val: str = key("", "dataset string, for validation during training")


def check_image_size(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is the short side in pixels, [height, width], or None."""
    sides = value if isinstance(value, list | tuple) else [value]
    if value is not None and not (len(sides) in (1, 2) and are_pixels(sides)):
        raise ValueError(f"{name}={value!r}: expected the short side in pixels, [height, width], or null")


def are_pixels(sides: Sequence[Any]) -> bool:
    """Return whether all sides are whole numbers of at least 1."""
    return all(isinstance(side, int) and side >= 1 for side in sides)
