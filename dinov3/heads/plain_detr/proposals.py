"""Boxes that the encoder proposes: maps at several strides, made from the one of the ViT, and a box for each cell.

Notable:
- Proposals are squares around cells, whose side doubles with each stride.
- Padded cells, and those whose square lies too near to the border or is too large for the image, become equal rows:
  their features are zero before the last projection. (No square of the published fourth stride is valid in images of
  400 pixels or less, and none at all in those of 48 or less.)
- The valid extent of an image is counted in whole cells of the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov3.heads.plain_detr.backbone import ChannelNorm
from dinov3.heads.plain_detr.nested import resize_mask

#: A proposal is valid if all of its numbers are between these shares of the valid extent.
VALID_SHARES = (0.01, 0.99)
#: Side of a proposal at the first stride, as a share of the image, where boxes are not pixels.
RELATIVE_SIZE = 0.05


class Proposals(NamedTuple):
    """What proposals are made of.

    Attributes:
        memory: [B, P, E], features of the cells of all strides, finest first.
        boxes: float32 [B, P, 4], (cx, cy, w, h) in pixels, or logits of shares of the image.
        max_shape: (height, width) of the valid extent in pixels, int64 [B, 1, 1] each; None if boxes are not pixels.
    """

    memory: Tensor
    boxes: Tensor
    max_shape: tuple[Tensor, Tensor] | None


def build_expansion(dim: int, in_stride: int, strides: Sequence[int]) -> nn.ModuleList:
    """Build one network for each stride, which brings maps [B, E, h, w] from `in_stride` to it.

    Args:
        dim: E.
        in_stride: pixels of a cell of the input.
        strides: pixels of a cell of the outputs, `in_stride` times powers of two.
    """
    networks = []
    for stride in strides:
        layer = nn.Conv2d if stride > in_stride else nn.ConvTranspose2d
        layers: list[nn.Module] = []
        for i in range(round(abs(math.log2(stride / in_stride)))):
            layers += [ChannelNorm(dim), nn.GELU()] if i else []
            layers.append(layer(dim, dim, 2, 2))
        networks.append(nn.Sequential(*layers))
    return nn.ModuleList(networks)


def make_proposals(
    maps: Sequence[Tensor], mask: Tensor, *, strides: Sequence[int], min_size: int, in_pixels: bool
) -> Proposals:
    """Propose a box for each cell of maps at several strides.

    Args:
        maps: [B, E, h_l, w_l] each.
        mask: bool [B, h, w] of the backbone's cells, True in the padding.
        strides: pixels of a cell of each map.
        min_size: side of the boxes of the first map, in pixels.
        in_pixels: boxes are pixels, otherwise logits of shares of the image.
    """
    masks = [resize_mask(mask, x.shape[-2:]) for x in maps]
    extents = [torch.stack([(~m[:, 0]).sum(1), (~m[:, :, 0]).sum(1)], -1) for m in masks]  # (columns, rows) [B, 2]
    boxes = []
    for level, (x, extent) in enumerate(zip(maps, extents, strict=True)):
        centres = _cell_centres(x).expand(len(x), -1, -1)  # [B, n, 2], in cells
        if in_pixels:
            centres, side = centres * strides[level], float(min_size * 2**level)
        else:
            centres, side = centres / extent[:, None], RELATIVE_SIZE * 2**level
        boxes.append(torch.cat([centres, torch.full_like(centres, side)], dim=-1))
    proposals = torch.cat(boxes, dim=1)  # [B, P, 4]
    width, height = (strides[0] * extents[0]).view(-1, 2, 1, 1).unbind(1)  # [B, 1, 1]
    limit = torch.cat([width, height, width, height], dim=-1).float() if in_pixels else proposals.new_ones(1, 1, 4)
    low, high = (share * limit for share in VALID_SHARES)
    valid = ((proposals > low) & (proposals < high)).all(-1, keepdim=True)
    valid = valid & ~torch.cat([m.flatten(1) for m in masks], dim=1)[..., None]
    if in_pixels:
        filling = float(max(maps[0].shape[-2:]) * strides[0])
    else:
        proposals, filling = (proposals / (1 - proposals)).log(), math.inf
    memory = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
    return Proposals(
        memory.masked_fill(~valid, 0.0),
        proposals.masked_fill(~valid, filling),
        (height, width) if in_pixels else None,
    )


def _cell_centres(x: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    rows = torch.arange(h, device=x.device, dtype=torch.float32) + 0.5
    columns = torch.arange(w, device=x.device, dtype=torch.float32) + 0.5
    centres = torch.meshgrid(columns, rows, indexing="xy")
    return torch.stack(centres, dim=-1).flatten(0, 1)  # [n, 2]
