"""Accuracy where any of a sample's classes is right, as for the re-assessed labels of ImageNet ("ReaL")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.eval.classification.metrics.classification import CountingMetric, target_rank


class AnyMatchAccuracy(CountingMetric):
    """Share of samples one of whose classes is among the k with the largest scores; samples without class are left out.

    Args:
        ks: one result per entry.
    """

    hits: Tensor
    total: Tensor

    def __init__(self, ks: Sequence[int]) -> None:
        super().__init__()
        self.ks = tuple(ks)
        self.add_counter("hits", len(self.ks))
        self.add_counter("total")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: scores [B, C].
            target: int64 [B, A], classes, padded with -1; not changed.
        """
        rank = best_rank(preds, target)
        self.hits += torch.stack([(rank < k).sum() for k in self.ks])
        self.total += (target >= 0).any(dim=1).sum()

    def compute(self) -> dict[str, Tensor]:
        """`{"top-<k>": fraction}` over the samples of all processes; NaN without samples."""
        hits, total = (distributed.all_reduce(t.clone()) for t in (self.hits, self.total))
        return {f"top-{k}": (hit.double() / total).float() for k, hit in zip(self.ks, hits, strict=True)}


class GroupByAnyMatchAccuracy(CountingMetric):
    """`AnyMatchAccuracy` for one k, over all samples and in each group of them.

    Args:
        k: among how many classes.
        groups: groupings of the N samples of a dataset: a label for each.
        mapped_targets: integers [N, A], classes of the samples, padded with -1.

    Attributes:
        names: of the groups; `<grouping>/<label>` where two groupings share a label.
    """

    counts: Tensor
    members: Tensor
    mapped_targets: Tensor

    def __init__(self, k: int, groups: Mapping[str, Sequence[Any]], mapped_targets: Any) -> None:
        super().__init__()
        self.k = k
        rows = [(grouping, label) for grouping, labels in groups.items() for label in sorted(set(map(str, labels)))]
        labels = [label for _, label in rows]
        self.names = [f"{grouping}/{label}" if labels.count(label) > 1 else label for grouping, label in rows]
        members = [[str(value) == label for value in groups[grouping]] for grouping, label in rows]
        targets = torch.as_tensor(np.asarray(mapped_targets), dtype=torch.int64)
        self.register_buffer("mapped_targets", targets, persistent=False)
        self.register_buffer("members", torch.tensor([[True] * len(targets), *members]), persistent=False)
        self.add_counter("counts", 2, 1 + len(self.names))

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch of scores [B, C] and indices [B] in the dataset."""
        classes = self.mapped_targets[target]
        has_class = (classes >= 0).any(dim=1)
        is_hit = best_rank(preds, classes) < self.k
        members = self.members[:, target]
        self.counts += torch.stack([(members & is_hit).sum(dim=1), (members & has_class).sum(dim=1)])

    def compute(self) -> dict[str, Tensor]:
        """`{"top-1": fraction over all, <group>: fraction in it, ...}`, over the samples of all processes."""
        hits, total = distributed.all_reduce(self.counts.clone())
        return dict(zip(["top-1", *self.names], (hits.double() / total).float(), strict=True))


def best_rank(scores: Tensor, targets: Tensor) -> Tensor:
    """The best rank of any target: how many classes come before it.

    Args:
        scores: [B, C].
        targets: int64 [B, A], padded with -1.

    Returns:
        int64 [B]; C for rows without target.
    """
    n_classes = scores.shape[1]
    if targets.shape[1] == 0:
        return targets.new_full((len(targets),), n_classes)
    ranks = torch.stack([target_rank(scores, column.clamp(min=0)) for column in targets.T], dim=1)  # [B, A]
    return torch.where(targets >= 0, ranks, n_classes).amin(dim=1)
