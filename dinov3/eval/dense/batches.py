"""Batches of images with maps of depth or labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def collate_pairs(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] and maps [B, 1, h, w] of samples (image [3, H, W], map [1, h, w]).

    Raises:
        ValueError: they differ in size.
    """
    images, maps = zip(*samples, strict=True)
    for kind, tensors in (("images", images), ("targets", maps)):
        sizes = sorted({tuple(tensor.shape[-2:]) for tensor in tensors})
        if len(sizes) > 1:
            listing = ", ".join(f"{height} x {width}" for height, width in sizes[:5])
            raise ValueError(
                f"the {kind} of a batch differ in size ({listing}): crop them to one size with transforms.train "
                "(random_crop of depth, crop_size of segmentation), or train with bs=1"
            )
    return torch.stack(list(images)), torch.stack([torch.as_tensor(one) for one in maps])
