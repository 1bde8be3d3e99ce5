"""What metrics of score curves share: they need the scores of all samples, in whatever order."""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor, nn

from dinov3 import distributed


class ScoresMetric(nn.Module):
    """Keeps all scores and targets, on the CPU.

    Args:
        num_classes: number of score columns C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self._batches: list[tuple[Tensor, Tensor]] = []

    def reset(self) -> None:
        """Forget all samples."""
        self._batches.clear()

    def clone(self) -> Self:
        """A copy with its own samples."""
        return copy.deepcopy(self)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep a batch of scores [B, C] and targets [B], or [B, C]."""
        self._batches.append((preds.detach().float().cpu(), target.cpu()))

    def compute(self) -> dict[str, Tensor]:
        """The results by name, over the samples of all processes."""
        raise NotImplementedError

    def gather(self) -> tuple[Tensor, Tensor]:
        """The scores and targets of all processes."""
        scores, targets = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        return torch.cat(distributed.gather_all_tensors(scores)), torch.cat(distributed.gather_all_tensors(targets))


def leave_unit_interval(scores: Tensor) -> bool:
    """Whether some score is no probability."""
    return not bool(((scores >= 0) & (scores <= 1)).all())


def precision_recall_points(scores: Tensor, is_positive: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall at every distinct score, from the largest down.

    Args:
        scores: [N].
        is_positive: boolean [N], with at least one true.

    Returns:
        float32 [K] each.
    """
    order = scores.argsort(descending=True, stable=True)
    ordered, hits = scores[order], is_positive[order].cumsum(0)
    is_last = torch.ones_like(ordered, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    said = torch.arange(1, len(scores) + 1, device=scores.device)
    return (hits / said)[is_last].float(), (hits / hits[-1])[is_last].float()
