"""Features of a dataset, extracted once, each process its own share of the rows.

Notable:
- An evaluation can use the rows where they are (`extract_rows`), or gather the whole matrix on every process
  (`gather_rows`, in bounded pieces); both in dataset order.
- Functions that make a matrix ask a `FeatureStore` where it lies: in memory, or in a file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from dinov3 import distributed
from dinov3.data import DatasetWithEnumeratedTargets, SamplerType, make_data_loader
from dinov3.data.loaders import usable_workers
from dinov3.eval.command.progress import track
from dinov3.eval.features.cache import IN_MEMORY, FeatureRows, FeatureStore, describe, model_device

logger = logging.getLogger("dinov3")

GATHER_PIECE_BYTES = 64 * 2**20
ROWS_PER_CHECK = 16384


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


def extract_cached(
    model: nn.Module,
    dataset: Any,
    store: FeatureStore,
    *,
    batch_size: int,
    num_workers: int,
    on_cpu: bool = False,
    collate_fn: Any = None,
    description: str = "features",
) -> FeatureRows:
    """Return this process's rows of a dataset's features, from the store or new; every process must call it.

    Args:
        model: returns [B, D] for a batch of images, under the caller's autocast.
        dataset: yields (image, target).
        store: where features are found, and where they go.
        batch_size: images per step and process.
        num_workers: of the loader.
        on_cpu: return features on the CPU instead of the model's device.
        collate_fn: see `make_enumerated_loader`.
        description: of the progress bar.
    """
    device = torch.device("cpu") if on_cpu else model_device(model)
    entry = describe(model, dataset) if store.keeps_entries else None
    path = store.find(entry, model, dataset)
    if path is not None:
        logger.info("%s: read from %s", description, path)
        return store.read(path, device)
    loader = make_enumerated_loader(dataset, batch_size, num_workers, collate_fn)
    rows = extract_rows(model, loader, on_cpu=on_cpu, description=description, store=store)
    if store.keeps_entries:
        path = store.write(entry, rows, gather_targets(rows))
        if path is not None and store.is_too_large(len(dataset), rows.features.shape[1]):
            # Drops the file without a name, so that the disk holds one copy instead of two.
            return store.read(path, device)
    return rows


@torch.no_grad()
def extract_rows(
    model: nn.Module,
    data_loader: Iterable[Any],
    *,
    on_cpu: bool = False,
    description: str = "features",
    store: FeatureStore = IN_MEMORY,
) -> FeatureRows:
    """Extract the features of the images that this process's loader yields.

    Args:
        model: returns [B, D] for a batch of images; put into evaluation mode, and called under the caller's autocast.
        data_loader: yields `(images, (index, targets))`; rows with a negative index are padding and are dropped.
        on_cpu: keep the features on the CPU instead of the model's device.
        description: of the progress bar.
        store: maps a file if the features of all processes are too large for memory.

    Raises:
        ValueError: the model returns NaN or infinity.
        OSError: features are too large for memory and for the disk.
    """
    model.eval()
    device = model_device(model)
    matrix_device = torch.device("cpu") if on_cpu else device
    started = time.perf_counter()
    matrix, n_rows, total_rows = torch.empty(0, 0), 0, 0
    targets: list[Tensor] = []
    index: list[Tensor] = []
    n_batches = len(data_loader) if isinstance(data_loader, Sized) else 1
    for images, (batch_index, batch_targets) in track(data_loader, description):
        real = batch_index >= 0
        features = model(images.to(device, non_blocking=True)).float()[real.to(device)]
        if not features.isfinite().all():
            raise ValueError(f"{description}: the model returns NaN or infinite features, so its weights are unusable")
        end = n_rows + len(features)
        if not index:
            # The size of the matrix of all processes decides where it lies; they have equal shares of it.
            share = n_batches * len(images)
            total_rows = share * distributed.get_world_size()
            _warn_if_too_large(store, description, total_rows, features.shape[1])
            matrix = store.new_matrix(share, features.shape[1], matrix_device, total_rows=total_rows)
        elif end > len(matrix):  # The loader has no length, or its first batch is smaller than others.
            larger = store.new_matrix(2 * end, features.shape[1], matrix.device, total_rows=total_rows)
            larger[:n_rows] = matrix[:n_rows]
            matrix = larger
        matrix[n_rows:end] = features.to(matrix.device)
        n_rows = end
        targets.append(batch_targets[real].to(matrix_device))
        index.append(batch_index[real])
    rows = FeatureRows(matrix[:n_rows], cat_padded(targets), torch.cat(index))
    order = first_occurrences(rows.positions)
    if not torch.equal(order, torch.arange(n_rows)):
        rows = FeatureRows(*(tensor[order.to(tensor.device)] for tensor in rows))
    seconds = time.perf_counter() - started
    logger.info(
        "%s: %d images, %.1f images/s per process", description, len(rows.positions), len(rows.positions) / seconds
    )
    return rows


def _warn_if_too_large(store: FeatureStore, description: str, n_rows: int, n_columns: int) -> None:
    if store.is_too_large(n_rows, n_columns) and distributed.is_main_process():
        logger.warning(
            "%s: %d x %d take %.0f MB, more than features.memory_budget_mb=%.0f, so they lie in a file in %s and are "
            "read block by block",
            description,
            n_rows,
            n_columns,
            4 * n_rows * n_columns / 2**20,
            store.memory_budget_mb,
            store.directory,
        )


def gather_rows(rows: FeatureRows, store: FeatureStore = IN_MEMORY) -> FeatureRows:
    """Gather the rows of all processes on every process; all must call it.

    Args:
        rows: those of this process.
        store: maps a file if the matrix is too large for memory.
    """
    if distributed.get_world_size() == 1:
        return rows
    own_positions = distributed.gather_all_tensors(rows.positions)
    all_positions = torch.cat(own_positions)
    order = first_occurrences(all_positions)
    positions = all_positions[order]
    dim = rows.features.shape[1]
    features = store.new_matrix(len(positions), dim, rows.features.device)
    piece = max(1, GATHER_PIECE_BYTES // (len(own_positions) * 4 * max(1, dim)))
    for start in range(0, max(map(len, own_positions)), piece):
        parts = distributed.gather_all_tensors(rows.features[start : start + piece])
        for part, of_rank in zip(parts, own_positions, strict=True):
            places = torch.searchsorted(positions, of_rank[start : start + piece])
            features[places.to(features.device)] = part.to(features.device)
    targets = cat_padded(distributed.gather_all_tensors(rows.targets))
    return FeatureRows(features, targets[order.to(targets.device)], positions)


def gather_targets(rows: FeatureRows) -> Tensor:
    """Gather only the targets of all processes, in dataset order; all processes must call it."""
    return gather_rows(rows._replace(features=rows.features[:, :0])).targets


def take_rows(features: Tensor, places: Tensor, store: FeatureStore = IN_MEMORY) -> Tensor:
    """Copy some rows of a float32 matrix, by their indices (int64)."""
    taken = store.new_matrix(len(places), features.shape[1], features.device)
    return torch.index_select(features, 0, places.to(features.device), out=taken)


def join_rows(parts: Sequence[Tensor], store: FeatureStore = IN_MEMORY) -> Tensor:
    """Concatenate the rows of feature matrices, float32."""
    joined = store.new_matrix(sum(map(len, parts)), parts[0].shape[1], parts[0].device)
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


def check_finite_rows(features: Tensor, name: str) -> None:
    """Raise a ValueError that names the count and the first of the rows [N, D] with NaN or infinity, if there are any.

    Args:
        features: may be mapped from a file; they are read block by block.
        name: of the features, for the message.
    """
    bad = torch.cat([~block.isfinite().all(dim=1) for block in features.split(ROWS_PER_CHECK)]).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(features)} rows of {name} contain NaN or infinity, the first is row {int(bad[0])}"
        )


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
