"""Sine encodings of positions on grids (DETR, arXiv 2005.12872, appendix A.4) and of single numbers.

Notable: the encoding of a grid counts its cells from 1. Mask2Former divides that count by the last one; detection
first subtracts half a cell (`offset=0.5`), so that the encoding is that of the centres of the cells.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Keeps the division by the last count finite, in grids without a valid cell.
EPS = 1e-6


def sine_encoding(values: Tensor, n_features: int, *, temperature: float = 10000.0) -> Tensor:
    """Encode numbers by sines (even features) and cosines (odd features) of falling frequency.

    Args:
        values: [...], in radians of the highest frequency.
        n_features: F, of each number.
        temperature: ratio of the highest to the lowest frequency.

    Returns:
        [..., F], in the dtype of `values`.
    """
    k = torch.arange(n_features, dtype=values.dtype, device=values.device)
    angles = values[..., None] / temperature ** (2 * (k / 2).floor() / n_features)  # [..., F]
    return torch.where(k % 2 == 0, angles.sin(), angles.cos())


def grid_sine_encoding(
    valid: Tensor,
    n_features: int,
    *,
    normalize: bool = True,
    offset: float = 0.0,
    scale: float = 2 * math.pi,
    temperature: float = 10000.0,
) -> Tensor:
    """Encode the rows and the columns of the cells of grids.

    Args:
        valid: bool [B, H, W], False in the padding, which is not counted.
        n_features: F, of each axis.
        normalize: divide the position along an axis by the last one.
        offset: subtracted from the counts 1, 2, ... of cells along an axis: 0 in Mask2Former, 0.5 in detection.
        scale: factor of positions, in radians.
        temperature: see `sine_encoding`.

    Returns:
        float32 [B, 2 F, H, W], rows first.
    """
    encodings = []
    for axis in (1, 2):
        count = valid.cumsum(axis, dtype=torch.float32)
        position = count - offset
        if normalize:
            position = position / (count.narrow(axis, -1, 1) + EPS)
        encodings.append(sine_encoding(position * scale, n_features, temperature=temperature))
    return torch.cat(encodings, dim=-1).permute(0, 3, 1, 2)
