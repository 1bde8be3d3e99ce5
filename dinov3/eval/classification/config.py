"""Parts of a configuration that evaluations share."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from omegaconf import MISSING

from dinov3.configs.settings import key
from dinov3.eval.command.model import FrozenBackbone, ModelConfig
from dinov3.eval.features.cache import FeaturesConfig
from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

logger = logging.getLogger("dinov3")


@dataclass
class TransformConfig:
    """How images are prepared: resized, cropped in the centre, normalised."""

    #: resize_size / crop_size of the published protocol; another one gets a warning.
    CUSTOMARY_RATIO: ClassVar[float] = 256 / 224

    resize_size: int = key(256, "short side after resizing, pixels")
    crop_size: int = key(224, "side of the central crop, pixels")
    mean: list[float] = key(
        list(IMAGENET_DEFAULT_MEAN), "mean of the channels, for values from 0 to 1; default: that of ImageNet"
    )
    std: list[float] = key(list(IMAGENET_DEFAULT_STD), "standard deviation of the channels; default: that of ImageNet")

    def __post_init__(self) -> None:
        if not 1 <= self.crop_size <= self.resize_size:
            raise ValueError(
                f"transform.resize_size={self.resize_size}, transform.crop_size={self.crop_size}: expected a crop of 1 "
                "pixel or more, and not larger than the resized image, or the rest of it would be black"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or min(values) < 0 or max(values) > 1 or (name == "std" and min(values) == 0):
                raise ValueError(f"transform.{name}={list(values)}: expected three numbers between 0 and 1")

    def check(self, backbone: FrozenBackbone) -> None:
        """Refuse crops smaller than a patch of the model; warn if images are not prepared as the model needs them.

        Raises:
            ValueError: names both sizes.
        """
        patch_size = getattr(backbone.model, "patch_size", None)
        if isinstance(patch_size, int):
            if self.crop_size < patch_size:
                raise ValueError(
                    f"transform.crop_size={self.crop_size}: the model needs at least a patch, {patch_size} pixels"
                )
            if left := self.crop_size % patch_size:
                logger.warning(
                    f"transform.crop_size={self.crop_size} is not a multiple of the model's patch size of "
                    f"{patch_size}: the last {left} rows and columns of pixels are not seen"
                )
        if backbone.normalization is None:
            return
        wanted = [list(map(float, values)) for values in backbone.normalization]
        if not np.allclose(wanted, [self.mean, self.std], atol=1e-3):
            logger.warning(
                "%s was trained on images normalised differently: give transform.mean=[%s] transform.std=[%s]",
                backbone.description,
                *(",".join(f"{value:.6g}" for value in values) for values in wanted),
            )


@dataclass
class FewShotConfig:
    """Training on subsets of each class."""

    enable: bool = key(False, "train on subsets of each class")
    k_or_percent: float | None = key(None, "1 or more: images per class; below 1: fraction of each class")
    n_tries: int = key(1, "number of subsets, drawn with seeds 0, 1, ...; results are averaged")

    def __post_init__(self) -> None:
        if self.enable and (self.k_or_percent is None or self.k_or_percent <= 0):
            raise ValueError("few_shot.enable=true needs few_shot.k_or_percent above 0")
        if not self.enable and (self.k_or_percent is not None or self.n_tries != 1):
            raise ValueError("few_shot.k_or_percent and few_shot.n_tries need few_shot.enable=true")
        if self.n_tries < 1:
            raise ValueError(f"few_shot.n_tries={self.n_tries}: expected 1 or more")


@dataclass
class ClassificationConfig:
    """What all classification evaluations are configured with; each declares its own `train` and `eval`."""

    model: ModelConfig = key(MISSING, "model.config_file and model.pretrained_weights, or model.dino_hub")
    train: Any = None
    eval: Any = None
    transform: TransformConfig = field(default_factory=TransformConfig)
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    save_results: bool = key(False, "write class scores and targets as .npy")
    output_dir: str = key("", "where results go; . on the command line")

    def check(self) -> None:
        """Refuse settings that cannot work, before anything is loaded; see `ModelConfig.check`."""
        self.model.check()
