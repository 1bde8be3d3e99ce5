"""Images of different sizes as one batch, and masks that say where the padding is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NestedTensor", "nested_tensor_from_tensor_list", "resize_mask"]


class NestedTensor:
    """A batch of padded tensors.

    Args:
        tensors: [B, C, H, W].
        mask: bool [B, H, W], True in the padding.
    """

    def __init__(self, tensors: Tensor, mask: Tensor) -> None:
        self.tensors = tensors
        self.mask = mask

    def to(self, device: torch.device | str) -> Self:
        """Return both on another device."""
        return type(self)(self.tensors.to(device), self.mask.to(device))

    def decompose(self) -> tuple[Tensor, Tensor]:
        """Return tensors and mask."""
        return self.tensors, self.mask

    def __len__(self) -> int:
        return len(self.tensors)


def nested_tensor_from_tensor_list(images: Sequence[Tensor], size: tuple[int, int] | None = None) -> NestedTensor:
    """Pad images with zeros at the bottom and right.

    Args:
        images: each [C, H, W], of one device and dtype.
        size: (height, width) of the result. Default: the largest of the images.

    Raises:
        ValueError: there are no images, or one does not have three dimensions.
    """
    if not len(images):
        raise ValueError("there are no images to make a batch of")
    if bad := [list(image.shape) for image in images if image.ndim != 3]:
        raise ValueError(f"expected images [channels, height, width], got one of shape {bad[0]}")
    height, width = size or (max(image.shape[1] for image in images), max(image.shape[2] for image in images))
    margins = [(0, width - image.shape[2], 0, height - image.shape[1]) for image in images]
    padded = [F.pad(image, margin) for image, margin in zip(images, margins, strict=True)]
    inside = [F.pad(torch.ones_like(im[0], dtype=torch.bool), m) for im, m in zip(images, margins, strict=True)]
    return NestedTensor(torch.stack(padded), ~torch.stack(inside))


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a mask [B, H, W] to (height, width), each cell taking the value of the nearest one at or before it."""
    return F.interpolate(mask[:, None].float(), size=tuple(size), mode="nearest")[:, 0].bool()
