"""Predictions and targets of a whole dataset, put back into its order."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov3 import distributed


class Accumulator:
    """Receives the outputs of an evaluation batch by batch."""

    def update(self, preds: Tensor, target: Tensor, index: Tensor) -> None:
        """Take the rows of a batch; `index` [B] are their positions in the dataset."""
        raise NotImplementedError

    def accumulate(self) -> dict[str, Tensor] | None:
        """What was collected, over all processes."""
        raise NotImplementedError


class NoOpAccumulator(Accumulator):
    """Keeps nothing."""

    def update(self, preds: Tensor, target: Tensor, index: Tensor) -> None:
        """Drop the batch."""

    def accumulate(self) -> None:
        """None."""


class ResultsAccumulator(Accumulator):
    """Keeps everything, on the CPU, and puts it into dataset order."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, preds: Tensor, target: Tensor, index: Tensor) -> None:
        """Keep a batch.

        Args:
            preds: [B, ...].
            target: int64 [B], or [B, A] lists padded with -1, whose width may differ between batches.
            index: int64 [B], positions in the dataset.
        """
        self._batches.append((preds.cpu(), target.cpu(), index.cpu()))

    def accumulate(self) -> dict[str, Tensor]:
        """The rows of all processes; every process must call it.

        Returns:
            `preds` and `target`, one row per position from 0 to the largest index.

        Raises:
            ValueError: some position was never given.
        """
        preds = torch.cat([batch[0] for batch in self._batches])
        target = cat_padded([batch[1] for batch in self._batches])
        index = torch.cat([batch[2] for batch in self._batches])
        preds, index = (torch.cat(distributed.gather_all_tensors(rows)) for rows in (preds, index))
        target = cat_padded(distributed.gather_all_tensors(target))
        # A sampler that repeats samples gives an index twice, with equal rows.
        order = first_occurrences(index)
        if not torch.equal(index[order], torch.arange(len(order))):
            raise ValueError("predictions are missing for some samples, so they cannot be put into dataset order")
        return {"preds": preds[order], "target": target[order]}


def cat_padded(tensors: list[Tensor], pad_value: int = -1) -> Tensor:
    """Concatenate [n] tensors, or [n, A] tensors of different width A, padded on the right."""
    if tensors[0].ndim == 1:
        return torch.cat(tensors)
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([_widen(tensor, width, pad_value) for tensor in tensors])


def _widen(tensor: Tensor, width: int, value: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)


def first_occurrences(index: Tensor) -> Tensor:
    """Positions in `index` [n] of each different value's first occurrence, in ascending order of the values."""
    order = index.argsort(stable=True)
    ascending = index[order]
    is_new = torch.ones_like(ascending, dtype=torch.bool)
    is_new[1:] = ascending[1:] != ascending[:-1]
    return order[is_new]
