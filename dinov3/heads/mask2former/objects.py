"""From queries to classes of pixels, object masks and panoptic maps (arXiv 2112.01527, section 4; 2107.06278, 3.4).

All three read the same prediction of one image: `pred_logits` [Q, K + 1], whose last class is "no object", and
`pred_masks`, logits [Q, h, w].
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov3.heads.mask2former.semantic import semantic_scores
from dinov3.layers.resizing import resize_bilinear


@dataclass
class Instances:
    """Objects of an image, the best first; their masks may overlap.

    Attributes:
        classes: int64 [N].
        scores: float32 [N], in [0, 1].
        masks: bool [N, H, W].
    """

    classes: Tensor
    scores: Tensor
    masks: Tensor


@dataclass
class Panoptic:
    """Segments of an image, of which each pixel is in at most one.

    Attributes:
        ids: int64 [H, W]: 0 in no segment, otherwise the number of the segment, from 1 on.
        classes: int64 [N], of the segments 1 to N.
        scores: float32 [N], in [0, 1].
    """

    ids: Tensor
    classes: Tensor
    scores: Tensor


def semantic(pred_logits: Tensor, pred_masks: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Return the class of each pixel, int64 [*size]; `size` is (height, width), by default that of the masks."""
    return semantic_scores(pred_logits[None], pred_masks[None], size)[0].argmax(dim=0)


def instance(
    pred_logits: Tensor,
    pred_masks: Tensor,
    size: Sequence[int] | None = None,
    *,
    stuff: Collection[int] = (),
    max_instances: int = 100,
    min_score: float = 0.0,
) -> Instances:
    """Return the object masks of an image.

    A query counts once for each class. Its score is the probability of the class times the mean probability inside its
    mask, so masks with blurred edges rank lower.

    Args:
        pred_logits: [Q, K + 1].
        pred_masks: logits [Q, h, w].
        size: (height, width) of the result. Default: (h, w).
        stuff: classes that have no objects, and are left out.
        max_instances: the most that are returned.
        min_score: those below are left out.
    """
    probabilities = pred_logits.float().softmax(dim=-1)[:, :-1]  # [Q, K]
    n_classes = probabilities.shape[1]
    things = [k for k in range(n_classes) if k not in set(stuff)]
    thing_ids = torch.tensor(things, dtype=torch.long, device=pred_logits.device)
    scores, order = probabilities[:, thing_ids].flatten().sort(descending=True, stable=True)
    scores, order = scores[:max_instances], order[:max_instances]
    queries, classes = order // max(len(things), 1), thing_ids[order % max(len(things), 1)]
    logits = _resized(pred_masks, size)
    masks = logits > 0
    inside = (logits.sigmoid() * masks).flatten(1).sum(1) / masks.flatten(1).sum(1).clamp(min=1)  # [Q]
    scores, order = (scores * inside[queries]).sort(descending=True, stable=True)
    kept = (scores > 0) & (scores >= min_score)  # without a pixel, a mask has the score 0
    order = order[kept]
    return Instances(classes[order], scores[kept], masks[queries[order]])


def flatten(found: Instances) -> Panoptic:
    """Lay objects on each other, the best on top."""
    ids = torch.zeros(found.masks.shape[-2:], dtype=torch.long, device=found.masks.device)
    for number in range(len(found.masks), 0, -1):
        ids[found.masks[number - 1]] = number
    return Panoptic(ids, found.classes, found.scores)


def panoptic(
    pred_logits: Tensor,
    pred_masks: Tensor,
    size: Sequence[int] | None = None,
    *,
    stuff: Collection[int] = (),
    min_score: float = 0.8,
    min_visible: float = 0.8,
) -> Panoptic:
    """Share out the pixels of an image among its segments.

    Args:
        pred_logits: [Q, K + 1].
        pred_masks: logits [Q, h, w].
        size: (height, width) of the result. Default: (h, w).
        stuff: classes whose masks are merged into one segment.
        min_score: of the classes of queries that take part.
        min_visible: a mask of which less than this share is left by others is dropped.
    """
    scores, classes = pred_logits.float().softmax(dim=-1).max(dim=-1)
    kept = (classes < pred_logits.shape[1] - 1) & (scores >= min_score)
    scores, classes = scores[kept], classes[kept]
    masks = _resized(pred_masks[kept], size).sigmoid()
    ids = masks.new_zeros(masks.shape[-2:], dtype=torch.long)
    found: list[int] = []  # the queries of the segments
    stuff_ids: dict[int, int] = {}
    if len(scores):
        owners = (scores[:, None, None] * masks).argmax(dim=0)
        for query, label in enumerate(classes.tolist()):
            whole = masks[query] >= 0.5
            visible = whole & (owners == query)
            n_visible = int(visible.sum())
            if not n_visible or n_visible < min_visible * int(whole.sum()):
                continue
            if label in stuff and label in stuff_ids:
                ids[visible] = stuff_ids[label]
                continue
            found.append(query)
            ids[visible] = stuff_ids[label] = len(found)
    return Panoptic(ids, classes[found], scores[found])


def _resized(masks: Tensor, size: Sequence[int] | None) -> Tensor:
    masks = masks.float()
    return masks if size is None or not len(masks) else resize_bilinear(masks[None], (int(size[0]), int(size[1])))[0]
