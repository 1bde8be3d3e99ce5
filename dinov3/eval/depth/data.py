"""The images and depth maps of a run: datasets by split, loaders that train and that evaluate."""

from __future__ import annotations

from typing import Any

from dinov3.data import make_dataset
from dinov3.data.datasets.strings import DATASETS, parse_dataset_string
from dinov3.eval.depth.config import (
    DepthConfig,
    make_depth_eval_transforms_from_config,
    make_depth_train_transforms_from_config,
)
from dinov3.eval.features.extraction import make_enumerated_loader


def make_depth_dataset(config: DepthConfig, split: str) -> Any:
    """The dataset of a split with its transforms.

    Args:
        config: of the run.
        split: `train`, `val` or `test`.

    Raises:
        ValueError: the dataset string means nothing, mixes metres with other units, or names no image.
        FileNotFoundError: what it names does not exist.
    """
    text = getattr(config.datasets, split)
    in_metres = _gives_metres(text)
    if split == "train":
        transforms = make_depth_train_transforms_from_config(config, in_metres=in_metres)
    else:
        transforms = make_depth_eval_transforms_from_config(config, split, in_metres=in_metres)
    dataset = make_dataset(dataset_str=text, transforms=transforms, root=config.datasets.root)
    if len(dataset) == 0:
        raise ValueError(f"datasets.{split}={text}: there are no images")
    return dataset


def make_depth_eval_loader(dataset: Any, num_workers: int) -> Any:
    """Of this process's share, one image at a time: `(images, (index, depths))`, padding with index -1.

    `images` is a list of [1, 3, H, W], the flipped one second where there is one, `depths` one of [1, 1, h, w].
    """
    return make_enumerated_loader(dataset, batch_size=1, num_workers=num_workers)


def _gives_metres(dataset_str: str) -> bool:
    kinds = {
        bool(getattr(DATASETS[one.name][0], "depth_in_metres", False)) for one in parse_dataset_string(dataset_str)
    }
    if len(kinds) > 1:
        raise ValueError(f"{dataset_str}: datasets in metres cannot be joined with datasets in other units")
    return kinds.pop()
