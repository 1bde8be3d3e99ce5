"""Images with a map per image, of depths or labels: datasets by split and batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinov3.data import make_dataset
from dinov3.data.fingerprint import check_same_on_all_ranks
from dinov3.eval.dense.config import DatasetsConfig
from dinov3.utils.messages import list_names


def make_paired_dataset(config: DatasetsConfig, split: str, transforms: Any) -> Any:
    """Make the dataset of a split, a field of `config`; all ranks call it.

    Args:
        config: the dataset strings and their root.
        split: e.g. `train`.
        transforms: of (image, map).

    Raises:
        ValueError: the dataset string is wrong, or it names no images, or not the same ones on all ranks.
        FileNotFoundError: what it names does not exist.
    """
    text = getattr(config, split)
    dataset = make_dataset(dataset_str=text, transforms=transforms, root=config.root)
    if len(dataset) == 0:
        raise ValueError(f"datasets.{split}={text}: there are no images")
    check_same_on_all_ranks(dataset, f"datasets.{split}={text}")
    return dataset


def collate_pairs(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack samples (image [3, H, W], map [1, h, w]) into images [B, 3, H, W] and maps [B, 1, h, w].

    Raises:
        ValueError: the images or the maps differ in size.
    """
    images, maps = zip(*samples, strict=True)
    for kind, tensors in (("images", images), ("targets", maps)):
        sizes = sorted({(tensor.shape[-2], tensor.shape[-1]) for tensor in tensors})
        if len(sizes) > 1:
            raise ValueError(
                f"the {kind} of a batch differ in size ({list_names([f'{h} x {w}' for h, w in sizes])}): crop them to "
                "one size with transforms.train (random_crop of depth, crop_size of segmentation), or train with bs=1"
            )
    return torch.stack(list(images)), torch.stack([torch.as_tensor(one) for one in maps])
