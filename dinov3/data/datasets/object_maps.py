"""Object maps: which class, and which object of it, a pixel belongs to, in one integer.

A pixel of class k holds `k`, if its dataset does not tell objects of that class apart, or `k + 256 * number` with the
number of its object in the image, from 1 on. So a map of classes is an object map, of one object per class; and every
transform of label maps, which resizes, crops, flips and pads with 255, fits.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Pixels that do not count: unlabelled ones, crowds, padding.
IGNORED = 255
#: Between the numbers of objects.
STEP = 256
#: Pixels that count and belong to no object.
NOTHING = IGNORED + STEP


def objects_of(label: Tensor) -> tuple[Tensor, Tensor]:
    """Split an object map [H, W] into the classes of its objects, int64 [G], and their masks, bool [G, H, W]."""
    label = label.long()
    values = label.unique()
    values = values[values % STEP != IGNORED]
    return values % STEP, label == values[:, None, None]


def classes_of(label: Tensor) -> Tensor:
    """Return the classes of an object map of any shape, int64, with 255 where a pixel is in no object or ignored."""
    return label.long() % STEP


def valid_pixels(label: Tensor) -> Tensor:
    """Return where an object map counts, bool of its shape."""
    return label != torch.as_tensor(IGNORED, dtype=label.dtype)
