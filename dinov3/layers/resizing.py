"""Bilinear resizing of maps, and of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def resize_bilinear(maps: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Resize maps [B, C, H, W] to (height, width), without antialiasing; the same tensor if it has that size."""
    height, width = int(size[0]), int(size[1])
    if maps.shape[-2:] == (height, width):
        return maps
    return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=align_corners)


def resize_antialiased(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps [B, C, H, W] to (height, width), with antialiasing where they become smaller.

    It computes in float32, because PyTorch lacks bfloat16 for this on the CPU.
    """
    height, width = int(size[0]), int(size[1])
    resized = F.interpolate(maps.float(), size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    return resized.to(maps.dtype)
