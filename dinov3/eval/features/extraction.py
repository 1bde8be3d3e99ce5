"""Features of a dataset, extracted once, each process its own share of the rows.

Notable:
- An evaluation can go on with the rows where they are (`extract_rows`), or have the whole matrix on every process
  (`gather_rows`, in bounded pieces); both in dataset order.
- Matrices that are too large for memory lie in a file that is mapped (`Spill`): whoever goes through them block by
  block needs no more memory than a block.
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
from torch import Tensor, nn
from torch.utils.data import default_collate

from dinov3 import distributed
from dinov3.data import DatasetWithEnumeratedTargets, SamplerType, make_data_loader
from dinov3.distributed import runtime
from dinov3.eval.command.progress import track
from dinov3.eval.features.accumulators import cat_padded, first_occurrences

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
    """Where matrices lie that are too large for memory.

    Attributes:
        directory: of their files, which have no name and vanish with the process.
        above_bytes: size from which on a matrix is too large.
    """

    directory: Path
    above_bytes: int

    def takes(self, n_rows: int, n_columns: int) -> bool:
        """Whether a float32 matrix is too large for memory."""
        return 4 * n_rows * n_columns > self.above_bytes

    def make(self, n_rows: int, n_columns: int) -> Tensor:
        """A float32 matrix in a file, on the CPU.

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
                f"{self.above_bytes / 2**20:.0f} and do not go into {self.directory} ({error}): set a larger budget, "
                "or a features.cache_dir on a larger disk"
            ) from error
        return torch.from_numpy(matrix)


def new_matrix(n_rows: int, n_columns: int, device: torch.device, spill: Spill | None) -> Tensor:
    """A float32 matrix of undefined values: on the device, or if `spill` takes it, in a file mapped on the CPU."""
    if spill is not None and spill.takes(n_rows, n_columns):
        return spill.make(n_rows, n_columns)
    return torch.empty(n_rows, n_columns, device=device)


def _spill_for(spill: Spill | None, description: str, n_rows: int, n_columns: int) -> Spill | None:
    # None if the matrix goes into memory; else says that it does not, and takes every part of it.
    if spill is None or not spill.takes(n_rows, n_columns):
        return None
    if distributed.is_main_process():
        logger.warning(
            "%s: %d x %d take %.0f MB, more than features.memory_budget_mb=%.0f: they lie in a file in %s and are read "
            "block by block",
            description,
            n_rows,
            n_columns,
            4 * n_rows * n_columns / 2**20,
            spill.above_bytes / 2**20,
            spill.directory,
        )
    return Spill(spill.directory, above_bytes=-1)


def model_device(model: nn.Module) -> torch.device:
    """Where the model's parameters are; this process's device for a model without any."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return runtime.device() if tensor is None else tensor.device


def usable_workers(wanted: int) -> int:
    """As many loader processes as asked for, but no more than there are processors for this process."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return min(wanted, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


def make_enumerated_loader(dataset: Any, batch_size: int, num_workers: int, collate_fn: Any = None) -> Any:
    """A loader of this process's share of a dataset, in order; the last process's share is padded with index -1.

    Args:
        dataset: gives (image, target); a target None becomes the sample's index.
        batch_size: images per step and process.
        num_workers: of the loader; more than there are processors count as that many.
        collate_fn: makes a batch of a list of `(image, (index, target))`; None: torch's, where a target may be None.

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
    """Torch's batch of `(image, (index, target))`, where the index takes the place of a target None, as of padding."""
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
    """The features of the images that this process's loader yields.

    Args:
        model: gives [B, D] for a batch of images; put into evaluation mode, and called under the caller's autocast.
        data_loader: yields `(images, (index, targets))`; rows with a negative index are padding and dropped.
        on_cpu: keep the features on the CPU instead of the model's device.
        description: what the progress bar says.
        spill: for features of all processes that are too large for memory.

    Raises:
        ValueError: the model gives NaN or infinity.
        OSError: features are too large for memory, and for the disk.
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
            raise ValueError(f"{description}: the model gives NaN or infinite features, its weights are not usable")
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
    """The rows of all processes, on every process; all must call it.

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
    """Some rows of a float32 matrix, by their indices (int64)."""
    taken = new_matrix(len(places), features.shape[1], features.device, spill)
    return torch.index_select(features, 0, places.to(features.device), out=taken)


def join_rows(parts: Sequence[Tensor], spill: Spill | None = None) -> Tensor:
    """Feature matrices one below the other, float32."""
    joined = new_matrix(sum(map(len, parts)), parts[0].shape[1], parts[0].device, spill)
    start = 0
    for part in parts:
        joined[start : start + len(part)] = part.to(joined.device)
        start += len(part)
    return joined


def extract_features(
    model: nn.Module, dataset: Any, batch_size: int, num_workers: int, gather_on_cpu: bool = False
) -> tuple[Tensor, Tensor]:
    """The features and targets of a whole dataset, on every process.

    Args:
        model: gives [B, D] for a batch of images.
        dataset: gives (image, target); a target None becomes the sample's index.
        batch_size: images per step and process.
        num_workers: of the loader.
        gather_on_cpu: return CPU tensors instead of such on the model's device.

    Returns:
        Features float32 [N, D] and targets int64 [N] or [N, L], in dataset order.
    """
    loader = make_enumerated_loader(dataset, batch_size, num_workers)
    return extract_features_with_dataloader(model, loader, gather_on_cpu=gather_on_cpu)


def extract_features_with_dataloader(
    model: nn.Module, data_loader: Iterable[Any], *, gather_on_cpu: bool = False
) -> tuple[Tensor, Tensor]:
    """`extract_features` of what a loader yields, as that of `make_enumerated_loader` does.

    Args:
        model: gives [B, D] for a batch of images.
        data_loader: yields `(images, (index, targets))`; rows with a negative index are padding and dropped.
        gather_on_cpu: return CPU tensors instead of such on the model's device.

    Returns:
        Features float32 [N, D] and targets int64 [N] or [N, L] of all processes, in the order of their indices.

    Raises:
        ValueError: the model gives NaN or infinity.
    """
    rows = gather_rows(extract_rows(model, data_loader, on_cpu=gather_on_cpu))
    return rows.features, rows.targets


class _GrowingMatrix:
    # Rows that come in batches, in one piece of memory (or of a file) from the beginning if their number is foreseen.

    def __init__(self, device: torch.device, spill: Spill | None, description: str) -> None:
        self.device = device
        self._spill, self._description = spill, description
        self._matrix: Tensor | None = None
        self._n_rows = 0

    def append(self, rows: Tensor, expected: int) -> None:
        end = self._n_rows + len(rows)
        if self._matrix is None:
            # The matrix of all processes decides, which have equal shares of it.
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
