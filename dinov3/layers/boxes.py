"""Boxes of objects: conversions, and the coding of a box relative to another one (R-CNN, arXiv 1311.2524, appendix C).

Boxes are (cx, cy, w, h) or corners (x1, y1, x2, y2), in the last dimension of a tensor. Arithmetic is in float32,
because a step of bfloat16 at 400 pixels is 2 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Added to the sizes that offsets are divided by, as in the published coding: decoding is not its exact inverse.
SIZE_OFFSET = 0.1


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert centre and size [..., 4] to corners."""
    centre, size = boxes.chunk(2, dim=-1)
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert corners [..., 4] to centre and size."""
    first, last = boxes.chunk(2, dim=-1)
    return torch.cat([(first + last) / 2, last - first], dim=-1)


def delta2bbox(
    proposals: Tensor,
    deltas: Tensor,
    max_shape: tuple[Tensor, Tensor] | None = None,
    wh_ratio_clip: float = 16 / 1000,
    clip_border: bool = True,
    add_ctr_clamp: bool = False,
    ctr_clamp: float = 32,
) -> Tensor:
    """Move and scale boxes.

    Args:
        proposals: [..., 4], (cx, cy, w, h).
        deltas: [..., 4]: shifts in sizes of the box, and logarithms of the growth.
        max_shape: (height, width) that clip the result, of a shape that broadcasts with corners [..., 2].
        wh_ratio_clip: the largest growth is `1 / wh_ratio_clip`, the smallest `wh_ratio_clip`.
        clip_border: False ignores `max_shape`.
        add_ctr_clamp: clip shifts to `ctr_clamp`, and growth only from above.
        ctr_clamp: in the unit of the boxes.

    Returns:
        Corners [..., 4], float32.
    """
    centre, size = proposals.float().chunk(2, dim=-1)
    shift, growth = deltas.float().chunk(2, dim=-1)
    shift = size * shift
    limit = abs(math.log(wh_ratio_clip))
    if add_ctr_clamp:
        shift = shift.clamp(-ctr_clamp, ctr_clamp)
        growth = growth.clamp(max=limit)
    else:
        growth = growth.clamp(-limit, limit)
    corners = box_cxcywh_to_xyxy(torch.cat([centre + shift, size * growth.exp()], dim=-1))
    if not clip_border or max_shape is None:
        return corners
    height, width = max_shape
    x, y = corners[..., 0::2], corners[..., 1::2]
    x, y = (v.clamp(min=0).minimum(limit.to(v.dtype)) for v, limit in ((x, width), (y, height)))
    return torch.stack([x, y], dim=-1).flatten(-2)


def bbox2delta(
    proposals: Tensor, gt: Tensor, means: Sequence[float] = (0, 0, 0, 0), stds: Sequence[float] = (1, 1, 1, 1)
) -> Tensor:
    """Compute the deltas that lead from boxes to others, both (cx, cy, w, h).

    Args:
        proposals: [n, 4].
        gt: [m, 4]; with m = n box by box, otherwise all pairs.
        means: subtracted from the deltas.
        stds: which the rest is divided by.

    Returns:
        float32 [n, 4], or [n, m, 4].
    """
    proposals, gt = proposals.float(), gt.float()
    if proposals.shape != gt.shape:
        proposals, gt = proposals[:, None], gt[None]
    centre, size = proposals.chunk(2, dim=-1)
    gt_centre, gt_size = gt.chunk(2, dim=-1)
    size = size + SIZE_OFFSET
    deltas = torch.cat([(gt_centre - centre) / size, (gt_size / size).log()], dim=-1)
    return (deltas - deltas.new_tensor(means)) / deltas.new_tensor(stds)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute the logits of probabilities, which are clipped to [0, 1] and kept `eps` away from its ends."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
