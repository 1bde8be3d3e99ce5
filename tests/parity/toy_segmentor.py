"""The stand-in segmentor of the golden cases of `segmentation`: what it predicts depends on the place in the window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity import deterministic

POOL = 4

Call = list[list[int]]


class ToySegmentor(nn.Module):
    """Pooled colours mixed to K classes, plus a ramp of each class over rows and columns.

    Args:
        k: number of classes.
        seed: of its weights.
        q: number of queries; given, `predict` returns what a Mask2Former head does.

    Attributes:
        calls: `[shape of the images, rescale_to]` of each call of `predict`, in order.
    """

    def __init__(self, k: int, seed: int, q: int | None = None) -> None:
        super().__init__()
        n_maps = k if q is None else q
        self.register_buffer("A", deterministic.tensor("A", (n_maps, 3), seed))
        self.register_buffer("b", deterministic.tensor("b", (n_maps, 2), seed))
        self.register_buffer("C", None if q is None else deterministic.tensor("C", (q, k + 1), seed))
        self.calls: list[Call] = []

    def predict(self, x: Tensor, rescale_to: Sequence[int] = (512, 512)) -> Tensor | dict[str, Tensor]:
        self.calls.append([list(x.shape), list(rescale_to)])
        maps = F.interpolate(self.logits(x), size=tuple(rescale_to), mode="bilinear", align_corners=False)
        if self.C is None:
            return maps
        queries = self.C + 0.5 * x.float().mean(dim=(1, 2, 3))[:, None, None]
        return {"pred_masks": maps, "pred_logits": queries}

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x.float(), POOL, POOL)  # [N, 3, h', w']
        rows, columns = (
            (torch.arange(size, dtype=torch.float32, device=x.device) + 0.5) / size for size in pooled.shape[-2:]
        )
        ramp = self.b[:, 0, None, None] * rows[:, None] + self.b[:, 1, None, None] * columns  # [K, h', w']
        return torch.einsum("kc,nchw->nkhw", self.A, pooled) + ramp
