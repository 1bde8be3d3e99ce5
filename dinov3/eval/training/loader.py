"""The images that a head on a frozen backbone is trained on, in an order that depends only on the seed.

Each image of the training has a place in one endless shuffled order, and what is random about it follows from the
place. So the batches of a resumed training are those of an uninterrupted one, and several processes share out the
images of one larger batch, whatever the number of loader workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, default_collate

from dinov3 import distributed
from dinov3.data.loaders import BatchRequest, TrainBatches, init_worker
from dinov3.data.samplers import InfiniteSampler
from dinov3.distributed import runtime

DATA_SEED = 0


def make_train_loader(
    dataset: Any,
    batch_size: int,
    num_workers: int,
    first_iteration: int,
    *,
    seed: int = DATA_SEED,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
) -> DataLoader[Any]:
    """Make an endless loader of this process's part of each batch.

    Args:
        dataset: gives samples by index; what it draws from the global generators is seeded by the place.
        batch_size: samples per step and process.
        num_workers: processes that load; 0: this one.
        first_iteration: steps that have been done.
        seed: of the order and of what is drawn.
        collate_fn: makes a batch of a list of samples.
    """
    return DataLoader(
        # Every sample is a batch of its own here: the loader of the backbone's training seeds whole batches, which
        # would depend on how many processes share them.
        TrainBatches(dataset, itemgetter(0), (seed, 0, 0), skip_bad_images=False),
        sampler=TrainOrder(len(dataset), batch_size, first_iteration, seed=seed),
        batch_size=batch_size,
        collate_fn=partial(_collate_samples, collate_fn),  # not a closure, so that workers can be spawned
        num_workers=num_workers,
        pin_memory=runtime.device().type == "cuda",
        worker_init_fn=init_worker,
        # Starting the workers would otherwise draw from the generator of the training.
        generator=torch.Generator(),
    )


class TrainOrder(Sampler[BatchRequest]):
    """The images of this process: every `world size`-th entry of the endless shuffled order, as single requests.

    Args:
        n_images: size of the dataset.
        batch_size: images per step and process.
        first_iteration: steps that have been done.
        seed: of the order.
    """

    def __init__(self, n_images: int, batch_size: int, first_iteration: int, *, seed: int = DATA_SEED) -> None:
        self._rank, self._world_size = distributed.get_rank(), distributed.get_world_size()
        self._first = first_iteration * batch_size * self._world_size
        # One order for all processes, of which they take turns, so that a batch of all does not depend on their number.
        self._order = InfiniteSampler(
            sample_count=n_images, shuffle=True, seed=seed, start=0, step=1, advance=self._first
        )

    def __iter__(self) -> Iterator[BatchRequest]:
        own = islice(enumerate(self._order, start=self._first), self._rank, None, self._world_size)
        return (BatchRequest(place, [index]) for place, index in own)


def _collate_samples(collate_fn: Callable[[list[Any]], Any], items: list[tuple[Any, Any]]) -> Any:
    # Samples come with the list of images that were replaced, empty here.
    return collate_fn([sample for sample, _ in items])
