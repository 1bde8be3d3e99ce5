"""Parts of a configuration that dense tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

from dinov3.configs.settings import key, settings_of
from dinov3.eval.command.model import ModelConfig
from dinov3.utils.messages import did_you_mean


class Dtype(Enum):
    """The precision that a model runs in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def autocast_dtype(self) -> torch.dtype:
        """The torch dtype."""
        return torch.float32 if self is Dtype.FLOAT32 else torch.bfloat16


@dataclass
class DatasetsConfig:
    """The images; `root` is added to dataset strings that have none."""

    root: str = key(MISSING, "directory of the datasets, e.g. that of nyu_train.txt or ADE20K_object150_train.txt")
    train: str = key("", "dataset string, e.g. NYU:split=TRAIN, DepthFolder:split=train or ADE20K:split=TRAIN")
    val: str = key("", "dataset string, for validation during training")


@dataclass
class RunConfig:
    """Settings of a run that do not depend on the task."""

    model: ModelConfig | None = None
    bs: int = key(2, "images per step and process in training", minimum=1)
    n_gpus: int = key(8, "not read: the launcher decides")
    num_workers: int = key(2, "loader processes", minimum=0)
    seed: int = key(0, "of the first weights, the order of the images and their augmentation")
    load_from: str | None = key(None, "evaluate: a trained head's file")
    head_weights: str | None = key(None, "file of the head of load_from=<hub model>; null: the published one")
    backbone_weights: str | None = key(None, "file of the backbone of load_from=<hub model>; null: the published one")

    def check_trained_model(self, released: Sequence[str]) -> None:
        """Refuse a run of a trained head, or a training, without a backbone, or whose trained head does not exist.

        Args:
            released: the models that `load_from` may name, but does not.

        Raises:
            ValueError: no model is given, it cannot be used, or there are weights of a released one.
            FileNotFoundError: there is no file `load_from`.
        """
        if self.head_weights or self.backbone_weights:
            raise ValueError(f"head_weights and backbone_weights go with load_from={' or '.join(released)}")
        if self.model is None:
            raise ValueError(
                "no model: give model.dino_hub=dinov3_vits16 model.weights=FILE, or model.config_file and "
                f"model.pretrained_weights of a training, or load_from={' or '.join(released)}"
            )
        self.model.check()
        if self.load_from and not Path(self.load_from).expanduser().exists():
            raise FileNotFoundError(
                f"load_from={self.load_from}{did_you_mean(self.load_from, released)}: there is no such file"
            )


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
