"""Features of a dataset, extracted once, each process its own share of the rows.

Notable:
- An evaluation can use the rows where they are (`extract_rows`), or gather the whole matrix on every process
  (`gather_rows`, in bounded pieces); both in dataset order.
- Matrices that are too large for memory are mapped from a file (`Spill`): reading them block by block needs no more
  memory than a block.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from dinov3 import distributed
from dinov3.data import DatasetWithEnumeratedTargets, SamplerType, make_data_loader
from dinov3.distributed import runtime
from dinov3.eval.command.progress import track

logger = logging.getLogger("dinov3")

GATHER_PIECE_BYTES = 64 * 2**20


class FeatureRows(NamedTuple):
    """Some rows of a dataset's features.

    Attributes:
        features: float32 [n, D].
        targets: int64 [n], or [n, L].
        positions: int64 [n] on the CPU, in the dataset, ascending and all different.
    """

    features: Tensor
    targets: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Spill:
    """Files for matrices that are too large for memory.

    Attributes:
        directory: of the files, which have no name and vanish with the process.
        above_bytes: larger matrices are too large.
    """

    directory: Path
    above_bytes: int

    def takes(self, n_rows: int, n_columns: int) -> bool:
        """Return whether a float32 matrix is too large for memory."""
        return 4 * n_rows * n_columns > self.above_bytes

    def make(self, n_rows: int, n_columns: int) -> Tensor:
        """Map a new float32 matrix from a file, on the CPU.

        Raises:
            OSError: the disk is too small, or the directory cannot be written.
        """
        n_bytes = 4 * n_rows * n_columns
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.directory).free
            if n_bytes > free:
                raise OSError(f"the disk has {free / 1e9:.1f} GB free")
            with tempfile.TemporaryFile(dir=self.directory) as file:
                file.truncate(n_bytes)
                matrix = np.memmap(file, dtype=np.float32, mode="r+", shape=(n_rows, n_columns))
        except OSError as error:
            raise OSError(
                f"features of {n_bytes / 1e9:.1f} GB are larger than features.memory_budget_mb="
                f"{self.above_bytes / 2**20:.0f} and do not fit into {self.directory} ({error}): set a larger budget, "
                "or a features.cache_dir on a larger disk"
            ) from error
        return torch.from_numpy(matrix)


def new_matrix(n_rows: int, n_columns: int, device: torch.device, spill: Spill | None) -> Tensor:
    """Make a float32 matrix of undefined values, on the device or, if `spill` takes it, mapped from a file."""
    if spill is not None and spill.takes(n_rows, n_columns):
        return spill.make(n_rows, n_columns)
    return torch.empty(n_rows, n_columns, device=device)


def _spill_for(spill: Spill | None, description: str, n_rows: int, n_columns: int) -> Spill | None:
    # None if the matrix fits into memory. Otherwise log that it does not; the result takes every part of it.
    if spill is None or not spill.takes(n_rows, n_columns):
        return None
    if distributed.is_main_process():
        logger.warning(
            "%s: %d x %d take %.0f MB, more than features.memory_budget_mb=%.0f, so they lie in a file in %s and are "
            "read block by block",
            description,
            n_rows,
            n_columns,
            4 * n_rows * n_columns / 2**20,
            spill.above_bytes / 2**20,
            spill.directory,
        )
    return Spill(spill.directory, above_bytes=-1)


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's parameters, or this process's device if it has none."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return runtime.device() if tensor is None else tensor.device


def usable_workers(wanted: int) -> int:
    """Limit the number of loader processes to the processors that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return min(wanted, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


def make_enumerated_loader(dataset: Any, batch_size: int, num_workers: int, collate_fn: Any = None) -> Any:
    """Make a loader of this process's share of a dataset, in order, padded at the end with index -1.

    Args:
        dataset: yields (image, target); a target None becomes the sample's index.
        batch_size: images per step and process.
        num_workers: of the loader, limited to the number of processors.
        collate_fn: makes a batch from a list of `(image, (index, target))`. Default: torch's; a target may be None.

    Returns:
        An iterable of `(images, (index, targets))`, of the same number of batches in every process.
    """
    return make_data_loader(
        dataset=DatasetWithEnumeratedTargets(dataset, pad_dataset=True, num_replicas=distributed.get_world_size()),
        batch_size=batch_size,
        num_workers=usable_workers(num_workers),
        shuffle=False,
        sampler_type=SamplerType.DISTRIBUTED,
        drop_last=False,
        collate_fn=collate_enumerated if collate_fn is None else collate_fn,
    )


def collate_enumerated(samples: list[tuple[Any, tuple[int, Any]]]) -> Any:
    """Make torch's batch of `(image, (index, target))`, with the index in place of a target None, as padding has."""
    return default_collate([(image, (index, index if y is None else y)) for image, (index, y) in samples])


@torch.no_grad()
def extract_rows(
    model: nn.Module,
    data_loader: Iterable[Any],
    *,
    on_cpu: bool = False,
    description: str = "features",
    spill: Spill | None = None,
) -> FeatureRows:
    """Extract the features of the images that this process's loader yields.

    Args:
        model: returns [B, D] for a batch of images; put into evaluation mode, and called under the caller's autocast.
        data_loader: yields `(images, (index, targets))`; rows with a negative index are padding and are dropped.
        on_cpu: keep the features on the CPU instead of the model's device.
        description: of the progress bar.
        spill: for features of all processes that are too large for memory.

    Raises:
        ValueError: the model returns NaN or infinity.
        OSError: features are too large for memory and for the disk.
    """
    model.eval()
    device = model_device(model)
    matrix = _GrowingMatrix(torch.device("cpu") if on_cpu else device, spill, description)
    started = time.perf_counter()
    targets, index = [], []
    n_batches = len(data_loader) if isinstance(data_loader, Sized) else 1
    for images, (batch_index, batch_targets) in track(data_loader, description):
        real = batch_index >= 0
        features = model(images.to(device, non_blocking=True)).float()[real.to(device)]
        if not features.isfinite().all():
            raise ValueError(f"{description}: the model returns NaN or infinite features, so its weights are unusable")
        matrix.append(features, expected=n_batches * len(images))
        targets.append(batch_targets[real].to(matrix.device))
        index.append(batch_index[real])
    rows = _in_order(matrix.rows(), cat_padded(targets), torch.cat(index))
    seconds = time.perf_counter() - started
    logger.info(
        "%s: %d images, %.1f images/s per process", description, len(rows.positions), len(rows.positions) / seconds
    )
    return rows


def gather_rows(rows: FeatureRows, spill: Spill | None = None) -> FeatureRows:
    """Gather the rows of all processes on every process; all must call it.

    Args:
        rows: those of this process.
        spill: for matrices that are too large for memory.
    """
    if distributed.get_world_size() == 1:
        return rows
    own_positions = distributed.gather_all_tensors(rows.positions)
    all_positions = torch.cat(own_positions)
    order = first_occurrences(all_positions)
    positions = all_positions[order]
    dim = rows.features.shape[1]
    features = new_matrix(len(positions), dim, rows.features.device, spill)
    piece = max(1, GATHER_PIECE_BYTES // (len(own_positions) * 4 * max(1, dim)))
    for start in range(0, max(map(len, own_positions)), piece):
        parts = distributed.gather_all_tensors(rows.features[start : start + piece])
        for part, of_rank in zip(parts, own_positions, strict=True):
            places = torch.searchsorted(positions, of_rank[start : start + piece])
            features[places.to(features.device)] = part.to(features.device)
    targets = cat_padded(distributed.gather_all_tensors(rows.targets))
    return FeatureRows(features, targets[order.to(targets.device)], positions)


def take_rows(features: Tensor, places: Tensor, spill: Spill | None = None) -> Tensor:
    """Copy some rows of a float32 matrix, by their indices (int64)."""
    taken = new_matrix(len(places), features.shape[1], features.device, spill)
    return torch.index_select(features, 0, places.to(features.device), out=taken)


def join_rows(parts: Sequence[Tensor], spill: Spill | None = None) -> Tensor:
    """Concatenate the rows of feature matrices, float32."""
    joined = new_matrix(sum(map(len, parts)), parts[0].shape[1], parts[0].device, spill)
    start = 0
    for part in parts:
        joined[start : start + len(part)] = part.to(joined.device)
        start += len(part)
    return joined


def extract_features(
    model: nn.Module, dataset: Any, batch_size: int, num_workers: int, gather_on_cpu: bool = False
) -> tuple[Tensor, Tensor]:
    """Extract the features and targets of a whole dataset, on every process.

    Args:
        model: returns [B, D] for a batch of images.
        dataset: yields (image, target); a target None becomes the sample's index.
        batch_size: images per step and process.
        num_workers: of the loader.
        gather_on_cpu: return tensors on the CPU instead of the model's device.

    Returns:
        Features float32 [N, D] and targets int64 [N] or [N, L], in dataset order.
    """
    loader = make_enumerated_loader(dataset, batch_size, num_workers)
    return extract_features_with_dataloader(model, loader, gather_on_cpu=gather_on_cpu)


def extract_features_with_dataloader(
    model: nn.Module, data_loader: Iterable[Any], *, gather_on_cpu: bool = False
) -> tuple[Tensor, Tensor]:
    """Extract the features and targets of what a loader such as `make_enumerated_loader`'s yields.

    Args:
        model: returns [B, D] for a batch of images.
        data_loader: yields `(images, (index, targets))`; rows with a negative index are padding and are dropped.
        gather_on_cpu: return tensors on the CPU instead of the model's device.

    Returns:
        Features float32 [N, D] and targets int64 [N] or [N, L] of all processes, in the order of their indices.

    Raises:
        ValueError: the model returns NaN or infinity.
    """
    rows = gather_rows(extract_rows(model, data_loader, on_cpu=gather_on_cpu))
    return rows.features, rows.targets


class _GrowingMatrix:
    # Collects batches of rows in one piece of memory (or of a file), allocated at once if their number is known.

    def __init__(self, device: torch.device, spill: Spill | None, description: str) -> None:
        self.device = device
        self._spill, self._description = spill, description
        self._matrix: Tensor | None = None
        self._n_rows = 0

    def append(self, rows: Tensor, expected: int) -> None:
        end = self._n_rows + len(rows)
        if self._matrix is None:
            # The size of the matrix of all processes decides; they have equal shares of it.
            n_all = expected * distributed.get_world_size()
            self._spill = _spill_for(self._spill, self._description, n_all, rows.shape[1])
            self._matrix = new_matrix(max(expected, end), rows.shape[1], self.device, self._spill)
        elif end > len(self._matrix):
            larger = new_matrix(2 * end, rows.shape[1], self.device, self._spill)
            larger[: self._n_rows] = self.rows()
            self._matrix = larger
        self._matrix[self._n_rows : end] = rows.to(self._matrix.device)
        self._n_rows = end

    def rows(self) -> Tensor:
        assert self._matrix is not None, "no batches"
        return self._matrix[: self._n_rows]


def _in_order(features: Tensor, targets: Tensor, index: Tensor) -> FeatureRows:
    order = first_occurrences(index)
    if torch.equal(order, torch.arange(len(index))):
        return FeatureRows(features, targets, index)
    return FeatureRows(features[order.to(features.device)], targets[order.to(targets.device)], index[order])


class ResultsAccumulator:
    """Collects predictions and targets batch by batch, on the CPU, and puts them into dataset order."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, preds: Tensor, target: Tensor, index: Tensor) -> None:
        """Add a batch.

        Args:
            preds: [B, ...].
            target: int64 [B], or [B, A] lists padded with -1, whose width may differ between batches.
            index: int64 [B], positions in the dataset.
        """
        self._batches.append((preds.cpu(), target.cpu(), index.cpu()))

    def accumulate(self) -> dict[str, Tensor]:
        """Gather the rows of all processes; every process must call it.

        Returns:
            `preds` and `target`, one row per position from 0 to the largest index.

        Raises:
            ValueError: a position is missing.
        """
        preds = torch.cat([batch[0] for batch in self._batches])
        target = cat_padded([batch[1] for batch in self._batches])
        index = torch.cat([batch[2] for batch in self._batches])
        preds, index = (torch.cat(distributed.gather_all_tensors(rows)) for rows in (preds, index))
        target = cat_padded(distributed.gather_all_tensors(target))
        # A sampler that repeats samples yields an index twice, with equal rows.
        order = first_occurrences(index)
        if not torch.equal(index[order], torch.arange(len(order))):
            raise ValueError("predictions are missing for some samples, so they cannot be put into dataset order")
        return {"preds": preds[order], "target": target[order]}


def cat_padded(tensors: list[Tensor]) -> Tensor:
    """Concatenate [n] tensors, or [n, A] tensors of different width A, padded on the right with -1."""
    if tensors[0].ndim == 1:
        return torch.cat(tensors)
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([F.pad(tensor, (0, width - tensor.shape[1]), value=-1) for tensor in tensors])


def first_occurrences(index: Tensor) -> Tensor:
    """Return the position in `index` [n] of the first occurrence of each value, in ascending order of the values."""
    order = index.argsort(stable=True)
    ascending = index[order]
    is_new = torch.ones_like(ascending, dtype=torch.bool)
    is_new[1:] = ascending[1:] != ascending[:-1]
    return order[is_new]
