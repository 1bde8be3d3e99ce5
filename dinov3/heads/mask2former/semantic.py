"""From queries to scores of classes for each pixel (arXiv 2112.01527, section 3 of its predecessor 2107.06278)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov3.heads.precision import autocast_to
from dinov3.layers.resizing import resize_bilinear

#: Rows of the result that are computed at once.
BAND_HEIGHT = 32


def semantic_scores(
    pred_logits: Tensor, pred_masks: Tensor, size: Sequence[int] | None = None, *, band_height: int = BAND_HEIGHT
) -> Tensor:
    """Sum over queries the probability of each class times that of each pixel.

    Masks are resized and multiplied in bands of rows, so that masks of the size of the result never exist.

    Args:
        pred_logits: [B, Q, K + 1]; the last class, "no object", has a share in the softmax and is then dropped.
        pred_masks: logits [B, Q, h, w].
        size: (height, width) that masks are resized to, bilinearly. Default: (h, w).
        band_height: rows in a band.

    Returns:
        float32 [B, K, *size]. Scores are not normalised: several queries may add up to more than 1.
    """
    height, width = pred_masks.shape[-2:] if size is None else (int(size[0]), int(size[1]))
    # Without autocast, in which the product would be in half precision.
    with autocast_to(pred_masks.device.type, torch.float32):
        classes = pred_logits.float().softmax(dim=-1)[..., :-1].mT  # [B, K, Q]
        scores = classes.new_empty(*classes.shape[:2], height, width)
        for first in range(0, height, band_height):
            last = min(first + band_height, height)
            masks = _resized_rows(pred_masks, (height, width), first, last).sigmoid()  # [B, Q, rows, width]
            scores[:, :, first:last] = (classes @ masks.flatten(2)).unflatten(2, (last - first, width))
    return scores


def _resized_rows(masks: Tensor, size: tuple[int, int], first: int, last: int) -> Tensor:
    # Rows `first` to `last` of what `resize_bilinear` makes of all masks.
    height, width = size
    n_rows = masks.shape[-2]
    if n_rows == height:
        return resize_bilinear(masks[:, :, first:last].float(), (last - first, width))
    rows = torch.arange(first, last, device=masks.device, dtype=torch.float32)
    source = ((rows + 0.5) * (n_rows / height) - 0.5).clamp(min=0)
    upper = source.floor().long().clamp(max=n_rows - 1)
    lower = (upper + 1).clamp(max=n_rows - 1)
    share = (source - upper)[:, None]
    band = torch.lerp(masks[:, :, upper].float(), masks[:, :, lower].float(), share)
    return resize_bilinear(band, (last - first, width))
