"""Images and depth maps of a run, by split."""

from __future__ import annotations

from typing import Any

from dinov3.data.datasets.strings import DATASETS, parse_dataset_string
from dinov3.eval.dense.data import make_paired_dataset
from dinov3.eval.depth.config import DepthConfig
from dinov3.eval.depth.transforms import make_depth_eval_transforms, make_depth_train_transforms


def make_depth_dataset(config: DepthConfig, split: str) -> Any:
    """Make the dataset of a split (`train`, `val` or `test`) with its transforms.

    Raises:
        ValueError: the dataset string is wrong, mixes metres with other units, or names no images.
        FileNotFoundError: what it names does not exist.
    """
    text = getattr(config.datasets, split)
    datasets = [DATASETS[one.name][0] for one in parse_dataset_string(text)]
    units = {bool(getattr(dataset, "depth_in_metres", False)) for dataset in datasets}
    if len(units) > 1:
        raise ValueError(f"{text}: datasets in metres cannot be joined with datasets in other units")
    return make_paired_dataset(config.datasets, split, make_transforms(config, split, in_metres=units.pop()))


def make_transforms(config: DepthConfig, split: str, *, in_metres: bool = False) -> Any:
    """Make the transforms of (image, depth) of a split; only `test` adds flipped images.

    Args:
        config: of the run.
        split: `train`, `val` or `test`.
        in_metres: the dataset gives metres, which `normalization_constant` must not divide.

    Raises:
        ValueError: `transforms.train` is missing.
    """
    transforms = config.transforms
    normalization_constant = 1.0 if in_metres else transforms.normalization_constant
    if split != "train":
        return make_depth_eval_transforms(
            normalization_constant=normalization_constant,
            img_size=transforms.eval.img_size,
            mean=transforms.mean,
            std=transforms.std,
            fixed_crop=transforms.eval.fixed_crop,
            tta=split == "test" and config.eval.use_tta,
        )
    if transforms.train is None:
        raise ValueError("transforms.train is missing: training needs it")
    return make_depth_train_transforms(
        normalization_constant=normalization_constant,
        rotation_angle=transforms.train.rotation_angle,
        img_size=transforms.train.img_size,
        random_crop_size=transforms.train.random_crop,
        fixed_crop=transforms.train.fixed_crop,
        mean=transforms.mean,
        std=transforms.std,
        brightness_range=transforms.train.brightness_range,
    )
