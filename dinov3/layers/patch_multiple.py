"""Images of any size for a network that needs multiples of its patch: padded or stretched, and back again."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.layers.resizing import resize_bilinear

#: Rows above and below, columns left and right.
Margins = tuple[int, int, int, int]


class CenterPadding(nn.Module):
    """Pads an image with zeros, the mean of normalised images, up to the next multiples.

    Args:
        multiple: of both sides, in pixels.

    Raises:
        ValueError: `multiple` is below 1.
    """

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = _check_multiple(multiple)

    def margins(self, height: int, width: int) -> Margins:
        """Return the padding of an image of this size: (top, bottom, left, right), in pixels."""
        rows, columns = (-side % self.multiple for side in (height, width))
        # The smaller half at the top and left, as the published dense heads pad.
        return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2

    def forward(self, x: Tensor) -> Tensor:
        """[..., H, W] to [..., H', W'], the multiples at or above; the same tensor if it has such sides."""
        top, bottom, left, right = self.margins(*x.shape[-2:])
        return F.pad(x, (left, right, top, bottom)) if top or bottom or left or right else x


class StretchToMultiple(nn.Module):
    """Resizes an image to the next multiples: bilinear, without antialiasing.

    Args:
        multiple: of both sides, in pixels.

    Raises:
        ValueError: `multiple` is below 1.
    """

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = _check_multiple(multiple)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H, W] to [..., H', W'], the multiples at or above; the same tensor if it has such sides."""
        height, width = (side + -side % self.multiple for side in x.shape[-2:])
        if x.shape[-2:] == (height, width):
            return x
        maps = x.reshape(1, math.prod(x.shape[:-2]), *x.shape[-2:])
        return resize_bilinear(maps, (height, width)).reshape(*x.shape[:-2], height, width)


def cut_margins(maps: Tensor, margins: Margins) -> Tensor:
    """Cut the margins off maps [B, C, H, W]; negative margins repeat the edge instead.

    Args:
        maps: of the image with its margins, one value per pixel.
        margins: (top, bottom, left, right), in pixels.
    """
    top, bottom, left, right = margins
    if min(margins) >= 0:
        return maps[..., top : maps.shape[-2] - bottom, left : maps.shape[-1] - right]
    return F.pad(maps, (-left, -right, -top, -bottom), mode="replicate")


def _check_multiple(multiple: int) -> int:
    if multiple < 1:
        raise ValueError(f"multiple={multiple}: expected at least 1 pixel")
    return int(multiple)
