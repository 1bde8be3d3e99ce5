"""Features of a dataset, extracted once, each process its own share of the rows.

Notable: an evaluation can go on with the rows where they are (`extract_rows`), or have the whole matrix on every
process (`gather_rows`, in bounded pieces); both in dataset order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm import tqdm

from dinov3 import distributed
from dinov3.data import DatasetWithEnumeratedTargets, SamplerType, make_data_loader
from dinov3.distributed import runtime
from dinov3.eval.accumulators import cat_padded, first_occurrences

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


def model_device(model: nn.Module) -> torch.device:
    """Where the model's parameters are; this process's device for a model without any."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return runtime.device() if tensor is None else tensor.device


def make_enumerated_loader(dataset: Any, batch_size: int, num_workers: int, collate_fn: Any = None) -> Any:
    """A loader of this process's share of a dataset, in order; the last process's share is padded with index -1.

    Args:
        dataset: gives (image, target); a target None becomes the sample's index.
        batch_size: images per step and process.
        num_workers: of the loader.
        collate_fn: makes a batch of a list of `(image, (index, target))`; None: torch's, where a target may be None.

    Returns:
        An iterable of `(images, (index, targets))`, of the same number of batches in every process.
    """
    return make_data_loader(
        dataset=DatasetWithEnumeratedTargets(dataset, pad_dataset=True, num_replicas=distributed.get_world_size()),
        batch_size=batch_size,
        num_workers=num_workers,
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
    model: nn.Module, data_loader: Iterable[Any], *, on_cpu: bool = False, description: str = "features"
) -> FeatureRows:
    """The features of the images that this process's loader yields.

    Args:
        model: gives [B, D] for a batch of images; put into evaluation mode, and called under the caller's autocast.
        data_loader: yields `(images, (index, targets))`; rows with a negative index are padding and dropped.
        on_cpu: keep the features on the CPU instead of the model's device.
        description: what the progress bar says.

    Raises:
        ValueError: the model gives NaN or infinity.
    """
    model.eval()
    device = model_device(model)
    destination = torch.device("cpu") if on_cpu else device
    started = time.perf_counter()
    features, targets, index = [], [], []
    # On the terminal of the main process alone.
    hidden = None if distributed.is_main_process() else True
    for images, (batch_index, batch_targets) in tqdm(data_loader, desc=description, unit="batch", disable=hidden):
        real = batch_index >= 0
        features.append(model(images.to(device, non_blocking=True)).float()[real.to(device)].to(destination))
        targets.append(batch_targets[real].to(destination))
        index.append(batch_index[real])
    rows = _in_order(torch.cat(features), cat_padded(targets), torch.cat(index))
    if not rows.features.isfinite().all():
        raise ValueError(f"{description}: the model gives NaN or infinite features, its weights are not usable")
    seconds = time.perf_counter() - started
    logger.info(
        "%s: %d images, %.1f images/s per process", description, len(rows.positions), len(rows.positions) / seconds
    )
    return rows


def gather_rows(rows: FeatureRows) -> FeatureRows:
    """The rows of all processes, on every process; all must call it."""
    world_size = distributed.get_world_size()
    if world_size == 1:
        return rows
    counts = distributed.all_gather_objects(len(rows.positions))
    piece = max(1, GATHER_PIECE_BYTES // (world_size * 4 * max(1, rows.features.shape[1])))
    features: list[list[Tensor]] = [[] for _ in range(world_size)]
    for start in range(0, max(counts), piece):
        for rank, part in enumerate(distributed.gather_all_tensors(rows.features[start : start + piece])):
            features[rank].append(part)
    targets = cat_padded(distributed.gather_all_tensors(rows.targets))
    index = torch.cat(distributed.gather_all_tensors(rows.positions))
    return _in_order(torch.cat([part for parts in features for part in parts]), targets, index)


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
    rows = gather_rows(extract_rows(model, loader, on_cpu=gather_on_cpu))
    return rows.features, rows.targets


def _in_order(features: Tensor, targets: Tensor, index: Tensor) -> FeatureRows:
    order = first_occurrences(index)
    if torch.equal(order, torch.arange(len(index))):
        return FeatureRows(features, targets, index)
    return FeatureRows(features[order.to(features.device)], targets[order.to(targets.device)], index[order])
