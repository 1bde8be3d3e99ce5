"""Parts of a configuration that evaluations share."""

from __future__ import annotations

from dataclasses import dataclass

from dinov3.eval.helpers import key


@dataclass
class TransformConfig:
    """Short side after resizing, and the side of the central crop, in pixels."""

    resize_size: int = key(256, "short side after resizing, pixels")
    crop_size: int = key(224, "side of the central crop, pixels")


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
