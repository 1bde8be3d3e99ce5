"""Bilinear resizing of maps."""

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
