"""Datasets from strings, and loaders that read them.

Notable:
- Everything random about a training batch depends only on (`train.seed`, loader, batch number, rank, position in the
  batch): not on the number of workers, and a resumed run sees the batches of an uninterrupted one.
- Nothing here is a closure, so that workers can be spawned as well as forked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import logging
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from dinov3 import distributed
from dinov3.data.datasets import BadImageError, ConcatenatedDataset
from dinov3.data.datasets.extended import ON_BAD_IMAGE, ExtendedVisionDataset
from dinov3.data.datasets.skipping import SkippingDataset
from dinov3.data.datasets.strings import (
    DATASETS,
    READING_KEYS,
    ParsedDataset,
    check_required_keys,
    parse_dataset_string,
)
from dinov3.data.datasets.web_dataset import StreamLayout
from dinov3.data.images import DEFAULT_READING, ImageReading
from dinov3.data.samplers import EpochSampler, InfiniteSampler, ShardedInfiniteSampler
from dinov3.data.stream_order import LaneOrder
from dinov3.distributed import runtime
from dinov3.utils.memory import keep_freed_memory

logger = logging.getLogger("dinov3")

MAX_REPLACEMENTS = 100


class SamplerType(Enum):
    """In which order, and by which process, samples are read; see `dinov3.data.samplers`."""

    DISTRIBUTED = 0  # torch's: each process reads its part once
    EPOCH = 1  # a given number of samples per epoch
    INFINITE = 2  # endless permutations, shared out among the processes
    SHARDED_INFINITE = 3  # endless, each process keeps to its part of the data
    SHARDED_INFINITE_NEW = 4  # the same, shuffled faster


_INFINITE = (SamplerType.INFINITE, SamplerType.SHARDED_INFINITE, SamplerType.SHARDED_INFINITE_NEW)


def make_dataset(
    *,
    dataset_str: str,
    transform: Callable[[Any], Any] | None = None,
    target_transform: Callable[[Any], Any] | None = None,
    transforms: Callable[[Any, Any], Any] | None = None,
    on_bad_image: str = "raise",
    root: str | None = None,
    reading: ImageReading = DEFAULT_READING,
) -> Any:
    """Open the dataset that a string such as `ImageFolder:root=/data/photos` names.

    Args:
        dataset_str: `NAME:key=value:...`, several joined by `+`; see `dinov3.data.datasets.strings`.
        transform: applied to the image.
        target_transform: applied to the target.
        transforms: applied to (image, target), instead of these two.
        on_bad_image: what to do with a tar shard that ends early, unless the string says it: `raise`, or `skip`, which
            uses what can be read of it. Single images that cannot be read are handled by the loader.
        root: for datasets that need one and whose string has none.
        reading: how images are read, where the string does not say it.

    Returns:
        The dataset, with items (image, target).

    Raises:
        DatasetStringError: a ValueError; the string cannot be parsed, or lacks a key.
        FileNotFoundError: a file or directory that it names does not exist.
    """
    parsed = parse_dataset_string(dataset_str)
    for one in parsed:
        keys = DATASETS[one.name][1].keys
        if root is not None and "root" in keys:
            one.kwargs.setdefault("root", root)
        if "on_bad_image" in keys:
            one.kwargs.setdefault("on_bad_image", on_bad_image)
    check_required_keys(parsed, dataset_str)
    given: dict[str, Any] = {"transform": transform, "target_transform": target_transform, "transforms": transforms}
    dataset: Any
    if len(parsed) == 1:
        dataset = _open(parsed[0], reading, **given)
    else:
        dataset = ConcatenatedDataset([_open(one, reading) for one in parsed], **given)
    for name, value in given.items():
        if not hasattr(dataset, name):
            setattr(dataset, name, value)
    logger.info("dataset %s: %d samples", dataset_str, len(dataset))
    return dataset


def _open(parsed: ParsedDataset, reading: ImageReading, **transforms: Any) -> ExtendedVisionDataset:
    arguments = dict(parsed.kwargs)
    skip = arguments.pop("skip", None)
    changed = {key: arguments.pop(key) for key in READING_KEYS if key in arguments}
    dataset_class: Any = DATASETS[parsed.name][0]
    dataset: ExtendedVisionDataset
    if skip is None:
        dataset = dataset_class(**arguments, **transforms)
    else:
        dataset = SkippingDataset(dataset_class(**arguments), skip, **transforms)
    if isinstance(dataset, ExtendedVisionDataset):  # `DATASETS` may hold others, of users
        dataset.read_images(dataclasses.replace(reading, **changed))
    return dataset


def make_data_loader(
    *,
    dataset: Any,
    batch_size: int,
    num_workers: int,
    shuffle: bool = True,
    seed: int = 0,
    sampler_type: SamplerType | None = SamplerType.INFINITE,
    sampler_size: int = -1,
    sampler_advance: int = 0,
    drop_last: bool = True,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    worker_init_fn: Callable[[int], None] | None = None,
    **worker_options: Any,
) -> DataLoader[Any]:
    """Make a loader for evaluations and for your own scripts; pretraining uses `make_train_data_loader`.

    Args:
        dataset: with `len()` and integer indices.
        batch_size: samples per batch and process.
        num_workers: processes that load; 0 for this one.
        shuffle: read the samples in a random order.
        seed: of that order.
        sampler_type: how the samples are shared out; None: this process reads all of them, once.
        sampler_size: for EPOCH, samples per epoch of all processes; -1 for as many as the dataset has.
        sampler_advance: for the infinite samplers, number of entries of this process to leave out.
        drop_last: leave out a last batch that is not full.
        collate_fn: makes a batch from a list of samples. Default: torch's.
        worker_init_fn: called in each worker with its number.
        **worker_options: other options of torch's DataLoader for workers (`persistent_workers`, `prefetch_factor`,
            `timeout`, `multiprocessing_context`); ignored without workers.

    Returns:
        The loader; its batches lie in pinned memory if this process has a CUDA device.

    Raises:
        TypeError: an iterable dataset.
        ValueError: `sampler_size` or `sampler_advance` for a sampler that does not take it.
        NotImplementedError: `sampler_advance` for EPOCH.
    """
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"{type(dataset).__name__} is an IterableDataset, which no sampler can index: give the dataset `__len__` "
            "and `__getitem__`, or use torch.utils.data.DataLoader for it"
        )
    sampler = _make_sampler(
        dataset, sampler_type, shuffle=shuffle, seed=seed, size=sampler_size, advance=sampler_advance
    )
    in_order = sampler_type is None
    return DataLoader(
        dataset,
        sampler=sampler,
        shuffle=shuffle if in_order else None,
        generator=torch.Generator().manual_seed(seed) if in_order and shuffle else None,
        batch_size=batch_size,
        drop_last=drop_last,
        collate_fn=collate_fn,
        pin_memory=runtime.device().type == "cuda",
        **_worker_options(
            num_workers, worker_init_fn=functools.partial(init_worker, then=worker_init_fn), **worker_options
        ),
    )


def make_train_data_loader(
    *,
    dataset: Any,
    batch_size: int,
    num_workers: int,
    sampler_type: SamplerType,
    sampler_seed: int,
    collate_fn: Callable[[list[Any]], Any],
    seed_key: tuple[int, int, int],
    first_batch: int = 0,
    on_bad_image: str = "raise",
    multiprocessing_context: Any = None,
) -> TrainDataLoader:
    """Make an endless, shuffled loader whose batches depend only on their number, not on what happened before.

    A dataset that streams (`WebDataset` with `mode=stream`) is read in the order of `dinov3.data.stream_order`,
    whatever the sampler; unlike a sampler's, that order also depends on the number of workers.

    Args:
        dataset: with `len()` and integer indices.
        batch_size: samples per batch and process.
        num_workers: processes that load; 0 for this one.
        sampler_type: INFINITE, SHARDED_INFINITE or SHARDED_INFINITE_NEW.
        sampler_seed: of the order, the same for all processes.
        collate_fn: makes a batch, a dictionary, from a list of samples; like the dataset, it may draw from the global
            generators of torch (CPU), NumPy and `random`.
        seed_key: (seed, number of the loader, rank), the seed of everything else that is random; none below 0.
        first_batch: number of the first batch to yield, which is the number of batches consumed before.
        on_bad_image: `raise`, or `skip`, which takes the next image instead of one that cannot be read, logs each such
            file once, and gives their number in the batch as `n_bad_images`.
        multiprocessing_context: how workers are started, e.g. `"spawn"`. Default: Python's.

    Returns:
        An iterable of batches.

    Raises:
        ValueError: an unsuitable sampler, `on_bad_image` or seed, or fewer samples than processes.
    """
    if sampler_type not in _INFINITE:
        names = ", ".join(one.name for one in _INFINITE)
        raise ValueError(f"training is endless: sampler_type must be one of {names}, got {sampler_type}")
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"train.on_bad_image={on_bad_image!r} is not one of {', '.join(ON_BAD_IMAGE)}")
    if min(seed_key) < 0:
        raise ValueError(f"seeds must be at least 0, got (seed, loader, rank) = {seed_key}")
    requests: Sampler[BatchRequest]
    if getattr(dataset, "stream", None) is not None:
        requests = StreamRequests(dataset.stream, batch_size, first_batch, max(1, num_workers), seed=sampler_seed)
    else:
        sampler = _make_sampler(
            dataset, sampler_type, shuffle=True, seed=sampler_seed, size=-1, advance=first_batch * batch_size
        )
        requests = BatchRequests(sampler, batch_size, first_batch)
    loader = DataLoader(
        TrainBatches(dataset, collate_fn, seed_key, skip_bad_images=on_bad_image == "skip"),
        sampler=requests,
        batch_size=None,
        collate_fn=_unchanged,
        pin_memory=runtime.device().type == "cuda",
        # Starting the workers would otherwise draw from the generator of the model.
        generator=torch.Generator(),
        **_worker_options(num_workers, worker_init_fn=init_worker, multiprocessing_context=multiprocessing_context),
    )
    return TrainDataLoader(loader, batch_size, counts_bad_images=on_bad_image == "skip")


class BatchRequest(NamedTuple):
    """What a worker needs to know to make one batch.

    Attributes:
        number: of the batch.
        indices: the samples that it is made of.
        ahead: for datasets that stream, the samples to read and hold before that; otherwise None.
        restart: first drop the samples that are held.
    """

    number: int
    indices: list[int]
    ahead: list[int] | None = None
    restart: bool = False


@dataclass(eq=False)
class BatchRequests(Sampler[BatchRequest]):
    """The entries of an endless sampler, grouped into numbered batches."""

    sampler: Sampler[int]
    batch_size: int
    first_batch: int

    def __iter__(self) -> Iterator[BatchRequest]:
        entries = iter(self.sampler)
        for number in itertools.count(self.first_batch):
            yield BatchRequest(number, list(itertools.islice(entries, self.batch_size)))


class StreamRequests(Sampler[BatchRequest]):
    """The batches of a dataset that streams: batch t belongs to lane t mod `n_lanes` of this process.

    A loader hands its batches to its workers in turn, so that a lane stays with one worker, the only one that reads its
    shards.

    Args:
        layout: of the dataset's shards.
        batch_size: samples per batch.
        first_batch: number of the first batch.
        n_lanes: number of workers of this process.
        seed: of the order, the same for all processes.
    """

    def __init__(self, layout: StreamLayout, batch_size: int, first_batch: int, n_lanes: int, *, seed: int) -> None:
        self._batch_size = batch_size
        self._first_batch = first_batch
        first_lane, n_lanes_of_all = distributed.get_rank() * n_lanes, distributed.get_world_size() * n_lanes
        self._lanes = [
            LaneOrder(layout.counts, window=layout.buffer, seed=seed, lane=first_lane + number, n_lanes=n_lanes_of_all)
            for number in range(n_lanes)
        ]

    def __iter__(self) -> Iterator[BatchRequest]:
        for number in itertools.count(self._first_batch):
            turn, lane = divmod(number, len(self._lanes))
            # The first batch of each lane, also after a resume: its worker holds nothing yet.
            restart = number < self._first_batch + len(self._lanes)
            request = self._lanes[lane].request(turn * self._batch_size, self._batch_size, restart=restart)
            yield BatchRequest(number, *request, restart=restart)


@dataclass(eq=False)
class TrainBatches(Dataset[tuple[dict[str, Any], list[tuple[int, str]]]]):
    """A dataset whose items are complete batches, each drawn from seeds of its own.

    An item is a pair: the batch, and for every image that was replaced its index and the error. The arguments are those
    of `make_train_data_loader`.
    """

    dataset: Any
    collate_fn: Callable[[list[Any]], dict[str, Any]]
    seed_key: tuple[int, int, int]
    skip_bad_images: bool = field(kw_only=True)

    def __getitem__(self, request: BatchRequest) -> tuple[dict[str, Any], list[tuple[int, str]]]:
        seed, loader, rank = self.seed_key
        key = [seed, loader, request.number, rank]
        problems: list[tuple[int, str]] = []
        if request.ahead is not None:
            self.dataset.read_ahead(request.ahead, restart=request.restart)
        # Without workers this is the training process, whose own generators must not notice.
        with _generators_restored():
            samples = [self._load(index, [*key, position], problems) for position, index in enumerate(request.indices)]
            # Again, so that the masks do not depend on how much the samples have drawn.
            _seed_generators(key)
            return self.collate_fn(samples), problems

    def _load(self, index: int, key: list[int], problems: list[tuple[int, str]]) -> Any:
        n_samples = len(self.dataset)
        n_tries = min(n_samples, MAX_REPLACEMENTS + 1)
        for attempt in range(n_tries):
            candidate = (index + attempt) % n_samples
            # Of the position, not of the image: the replacement draws what the image would have drawn.
            _seed_generators(key)
            try:
                return self.dataset[candidate]
            except BadImageError as error:
                if not self.skip_bad_images:
                    raise
                problems.append((candidate, str(error)))
        raise BadImageError(
            f"none of {n_tries} images in a row can be read, starting at index {index}; the last: {problems[-1][1]}"
        )


@dataclass(eq=False)
class TrainDataLoader:
    """The batches of `make_train_data_loader`. Each `iter()` starts again at the first one."""

    loader: DataLoader[Any]
    batch_size: int
    counts_bad_images: bool
    _reported: set[int] = field(default_factory=set, init=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch, problems in self.loader:
            # Reported here, because workers do not know of each other and may have no log.
            for index, message in problems:
                if index not in self._reported:
                    self._reported.add(index)
                    logger.warning("%s; another image takes its place", message)
            if self.counts_bad_images:
                batch["n_bad_images"] = len(problems)
            yield batch


def init_worker(worker: int, then: Callable[[int], None] | None = None) -> None:
    """Set up a worker process of a loader.

    Args:
        worker: its number.
        then: called last, with that number.
    """
    # Transforms leave cycles behind, and a training loop switches the collector off. What a forked worker shares with
    # its parent is frozen, or the collector would write to, and so copy, each page of it.
    gc.freeze()
    gc.enable()
    keep_freed_memory()  # forked workers have it from their parent, spawned ones not
    # Slurm and terminals send signals to the whole process group: a worker that one of them kills would end the
    # training before it has saved itself.
    if hasattr(os, "setpgid"):
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
    if then is not None:
        then(worker)


def _make_sampler(
    dataset: Any, sampler_type: SamplerType | None, *, shuffle: bool, seed: int, size: int, advance: int
) -> Any:
    if size > 0 and sampler_type is not SamplerType.EPOCH:
        raise ValueError(f"sampler_size={size} is for SamplerType.EPOCH, not for {sampler_type}")
    if advance > 0 and sampler_type is SamplerType.EPOCH:
        raise NotImplementedError(f"sampler_advance={advance}: SamplerType.EPOCH cannot be advanced")
    if advance > 0 and sampler_type not in _INFINITE:
        raise ValueError(f"sampler_advance={advance} is for the infinite samplers, not for {sampler_type}")
    count = len(dataset)
    match sampler_type:
        case None:
            return None
        case SamplerType.DISTRIBUTED:
            rank, world_size = distributed.get_rank(), distributed.get_world_size()
            return DistributedSampler(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        case SamplerType.EPOCH:
            return EpochSampler(size=size if size > 0 else count, sample_count=count, shuffle=shuffle, seed=seed)
        case SamplerType.INFINITE:
            return InfiniteSampler(sample_count=count, shuffle=shuffle, seed=seed, advance=advance)
        case SamplerType.SHARDED_INFINITE | SamplerType.SHARDED_INFINITE_NEW:
            return ShardedInfiniteSampler(
                sample_count=count,
                shuffle=shuffle,
                seed=seed,
                advance=advance,
                use_new_shuffle_tensor_slice=sampler_type is SamplerType.SHARDED_INFINITE_NEW,
            )
    raise ValueError(f"sampler_type={sampler_type!r} is not a SamplerType")


def usable_workers(wanted: int) -> int:
    """Limit the number of loader processes to the processors that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return min(wanted, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


def _worker_options(num_workers: int, **options: Any) -> dict[str, Any]:
    # Torch refuses most of these options without workers.
    return {"num_workers": num_workers} | (options if num_workers > 0 else {})


def _unchanged(batch: Any) -> Any:
    return batch


def _seed_generators(key: list[int]) -> None:
    words = np.random.SeedSequence(key).generate_state(8)
    random.seed(words.tobytes())
    np.random.seed(words)
    # Not `torch.manual_seed`, which also seeds the generators of other devices.
    torch.default_generator.manual_seed(int(words[:2].view(np.uint64)[0]))


@contextlib.contextmanager
def _generators_restored() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
