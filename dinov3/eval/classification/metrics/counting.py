"""Metrics that count: their state is a few counters per class, summed over processes when a metric is computed.

Notable: ranks are counted instead of sorted: the rank of a target is the number of classes with a larger score. Among
equal scores the lower class comes first, so results depend neither on the device nor on the batches.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from dinov3 import distributed

THRESHOLD = 0.5
RECIPROCAL_RANK_EPS = 1e-6


class CountingMetric(nn.Module):
    """A metric whose state is one tensor of counts; a subclass has `update(preds, target)` and `compute()`.

    Args:
        shape: of the counts.
        dtype: of the counts.
    """

    counts: Tensor

    def __init__(self, *shape: int, dtype: torch.dtype = torch.int64) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(shape, dtype=dtype), persistent=False)

    def reset(self) -> None:
        """Forget all samples."""
        self.counts.zero_()

    def clone(self) -> Self:
        """Return a copy with its own counts."""
        return copy.deepcopy(self)

    def summed(self) -> Tensor:
        """Return the counts of all processes; every process must call it."""
        return distributed.all_reduce(self.counts.clone())


class TopKAccuracy(CountingMetric):
    """Share of samples whose target is among the k classes with the largest scores.

    Args:
        num_classes: number of score columns C.
        ks: one result per entry.
        average: `micro`: over samples. `macro`: mean over classes of the share in each class; classes without samples
            are left out, except that for k = 1 one that was predicted counts as 0. `none`: the share in each class,
            0 without samples.
    """

    def __init__(self, num_classes: int, ks: Sequence[int], average: str) -> None:
        # [k..., C] hits by k, then how often each class was the target, then how often it was predicted.
        super().__init__(len(ks) + 2, num_classes)
        self.ks = tuple(ks)
        self.average = average

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch of scores [B, C] and classes [B]."""
        target = target.long()
        rank = target_rank(preds, target)
        for row, weight in enumerate([*(rank < k for k in self.ks), torch.ones_like(rank)]):
            self.counts[row].scatter_add_(0, target, weight.long())
        predicted = preds.argmax(dim=1) if len(preds) else target
        self.counts[-1].scatter_add_(0, predicted, torch.ones_like(predicted))

    def compute(self) -> dict[str, Tensor]:
        """Return `{"top-<k>": fraction}` over the samples of all processes, float32; NaN without samples.

        Fractions are 0-dimensional, or [C] with `average="none"`.
        """
        *hits, present, predicted = self.summed()
        return {f"top-{k}": self._average(k, row, present, predicted) for k, row in zip(self.ks, hits, strict=True)}

    def present(self) -> Tensor:
        """Return which classes have samples in any process, boolean [C]."""
        return self.summed()[-2] > 0

    def _average(self, k: int, hits: Tensor, present: Tensor, predicted: Tensor) -> Tensor:
        if self.average == "micro":
            return (hits.sum().double() / present.sum()).float()
        shares = hits.double() / present.clamp(min=1)
        if self.average == "none":
            return shares.float()
        counted = present + predicted > 0 if k == 1 else present > 0
        return shares[counted].mean().float()


class MulticlassF1(TopKAccuracy):
    """F1 of the best class.

    Args:
        num_classes: number of score columns C.
        average: `micro`: over samples, which is the accuracy. `macro`: mean over classes that occur or were predicted.
    """

    def __init__(self, num_classes: int, average: str) -> None:
        super().__init__(num_classes, (1,), average)

    def compute(self) -> dict[str, Tensor]:
        """Return `{"top-1": F1}` over the samples of all processes."""
        hits, present, predicted = self.summed().double()
        if self.average == "micro":
            return {"top-1": (hits.sum() / present.sum()).float()}
        both = present + predicted
        return {"top-1": (2 * hits / both)[both > 0].mean().float()}


class MultilabelF1(CountingMetric):
    """F1 at probability 1/2; scores are probabilities if all of them lie in [0, 1], otherwise logits.

    Args:
        num_classes: number of score columns C.
        average: `micro`: over all entries. `macro`: mean over classes; one that neither occurs nor is predicted is 0.
    """

    def __init__(self, num_classes: int, average: str) -> None:
        # Which scores are meant shows at the end, so both are counted. [C] each: hits and positive predictions of
        # scores taken as probabilities, the same for logits, positive targets, scores outside of [0, 1].
        super().__init__(6, num_classes)
        self.average = average

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch of scores [B, C] and multi-hot targets [B, C]."""
        is_positive = target > 0
        as_probability, as_logit = preds > THRESHOLD, preds > 0
        rows = [as_probability & is_positive, as_probability, as_logit & is_positive, as_logit, is_positive]
        self.counts += torch.stack([*rows, (preds < 0) | (preds > 1)]).sum(dim=1)

    def compute(self) -> dict[str, Tensor]:
        """Return `{"top-1": F1}` over the samples of all processes."""
        counts = self.summed().double()
        hits, predicted = counts[2:4] if counts[5].sum() > 0 else counts[:2]
        both = predicted + counts[4]
        if self.average == "micro":
            hits, both = hits.sum(), both.sum()
        return {"top-1": (2 * hits / both.clamp(min=1)).mean().float()}


class MacroAveragedMeanReciprocalRank(CountingMetric):
    """Mean over all classes of the mean of 1 / rank of the target; among equal scores the target comes last.

    Args:
        num_classes: number of score columns C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(2, num_classes, dtype=torch.float64)  # sums of reciprocal ranks, samples

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch of scores [B, C] and classes [B]."""
        target = target.long()
        # Negated, so that a NaN counts as larger.
        rank = (~(preds < preds.gather(1, target[:, None]))).sum(dim=1)
        self.counts[0].scatter_add_(0, target, 1 / rank.double())
        self.counts[1].scatter_add_(0, target, torch.ones_like(rank, dtype=torch.float64))

    def compute(self) -> dict[str, Tensor]:
        """Return `{"top-1": mean}` over the samples of all processes; a class without samples counts as 0."""
        sums, n_samples = self.summed()
        return {"top-1": (sums / (n_samples + RECIPROCAL_RANK_EPS)).mean().float()}


class AnyMatchAccuracy(CountingMetric):
    """Share of samples one of whose classes is among the k with the largest scores, as for ImageNet-ReaL.

    Args:
        ks: one result per entry.
    """

    def __init__(self, ks: Sequence[int]) -> None:
        super().__init__(len(ks) + 1)  # hits by k, samples with a class
        self.ks = tuple(ks)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: scores [B, C].
            target: int64 [B, A], classes, padded with -1; samples without a class are left out.
        """
        rank = best_rank(preds, target)
        has_class = (target >= 0).any(dim=1)
        self.counts += torch.stack([*((rank < k).sum() for k in self.ks), has_class.sum()])

    def compute(self) -> dict[str, Tensor]:
        """Return `{"top-<k>": fraction}` over the samples of all processes; NaN without samples."""
        *hits, total = self.summed()
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

    members: Tensor
    mapped_targets: Tensor

    def __init__(self, k: int, groups: Mapping[str, Sequence[Any]], mapped_targets: Any) -> None:
        rows = [(grouping, label) for grouping, labels in groups.items() for label in sorted(set(map(str, labels)))]
        super().__init__(2, 1 + len(rows))  # hits, samples with a class
        self.k = k
        labels = [label for _, label in rows]
        self.names = [f"{grouping}/{label}" if labels.count(label) > 1 else label for grouping, label in rows]
        members = [[str(value) == label for value in groups[grouping]] for grouping, label in rows]
        targets = torch.as_tensor(np.asarray(mapped_targets), dtype=torch.int64)
        self.register_buffer("mapped_targets", targets, persistent=False)
        self.register_buffer("members", torch.tensor([[True] * len(targets), *members]), persistent=False)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch of scores [B, C] and indices [B] in the dataset."""
        classes = self.mapped_targets[target]
        has_class = (classes >= 0).any(dim=1)
        is_hit = best_rank(preds, classes) < self.k
        members = self.members[:, target]
        self.counts += torch.stack([(members & is_hit).sum(dim=1), (members & has_class).sum(dim=1)])

    def compute(self) -> dict[str, Tensor]:
        """Return `{"top-1": fraction over all, <group>: fraction in it, ...}`, over the samples of all processes."""
        hits, total = self.summed()
        return dict(zip(["top-1", *self.names], (hits.double() / total).float(), strict=True))


def target_rank(scores: Tensor, target: Tensor) -> Tensor:
    """Count the classes that come before the target: larger scores, and equal scores of lower classes.

    Args:
        scores: [B, C].
        target: [B], integers in [0, C).

    Returns:
        int64 [B]. NaN comes before everything else, so a target of score NaN is behind all C classes.
    """
    own = scores.gather(1, target[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    return (~(scores <= own) | ((scores == own) & lower)).sum(dim=1)


def best_rank(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the smallest `target_rank` of several targets.

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


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Return the percentage of rows of `output` [B, C] whose `target` [B] is among the k largest, for each k."""
    rank = target_rank(output, target)
    return [(rank < k).float().mean() * 100 for k in topk]
