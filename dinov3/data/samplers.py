"""In which order a dataset is read: every process takes its own slice of one order that all of them know.

Notable:
- The orders are those of the published recipes, bit for bit, but made with array operations instead of one random draw
  in Python per sample.
- `advance=k` gives exactly what is left of a sequence after its first k entries, at next to no cost, so that a run can
  be resumed at its millionth step.
- Each `iter()` restarts the same sequence.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Sampler

from dinov3 import distributed

# From these sizes on, torch's `randperm` and `randint` draw 64-bit words, and the array operations below would no
# longer repeat the loops that define the orders.
RANDPERM_64BIT_FROM = 2**32 // 20
RANDINT_64BIT_FROM = 2**28

# For smaller datasets, waking a thread takes longer than making a pass.
BACKGROUND_FROM = 100_000

_CHUNK = 2**16
_WORDS_PER_DISCARD = 2**22


class EpochSampler(Sampler[int]):
    """A finite number of samples per epoch, which may be fewer or more than there are.

    The order of an epoch is a function of `seed * epoch` (of only `epoch` if the seed is 0): epoch 0 is the same
    for every seed, and seed 2 in epoch 3 repeats seed 3 in epoch 2. Published behaviour, kept for reproducibility.

    Args:
        size: samples per epoch, of all processes together.
        sample_count: length N of the dataset; indices 0..N-1 are repeated as often as `size` needs.
        shuffle: draw `size` of the repeated indices without replacement; otherwise take the first `size`.
        seed: of the order.
        start: first position of this process in the order. Default: its rank.
        step: distance between its positions. Default: the number of processes.

    Raises:
        ValueError: `size`, `sample_count` or `step` below 1, or `start` below 0.
    """

    def __init__(
        self,
        *,
        size: int,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"EpochSampler: size must be at least 1, got {size}")
        self._size = size
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start, self._step = _slice_of_this_process(sample_count, start, step)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; without a call every epoch has the order of epoch 0."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        indices = np.tile(np.arange(self._sample_count), -(-self._size // self._sample_count))
        if self._shuffle:
            generator = np.random.default_rng(self._seed * self._epoch if self._seed != 0 else self._epoch)
            indices = generator.choice(indices, self._size, replace=False)
        yield from indices[: self._size][self._start :: self._step].tolist()

    def __len__(self) -> int:
        return len(range(self._start, self._size, self._step))


class _EndlessSampler(Sampler[int]):
    # Passes over the data, one after the other; `_count` is the number of entries of this process in each of them.

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
    ) -> None:
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start, self._step = _slice_of_this_process(sample_count, start, step)
        if advance < 0:
            raise ValueError(f"advance must be at least 0, got {advance}")
        self._advance = advance
        self._count = self._count_entries()
        if self._count < 1:
            raise ValueError(
                f"no sample is left for process {self._start} of {self._step}: the dataset has {sample_count} samples; "
                "use a larger dataset or fewer processes"
            )

    def __iter__(self) -> Iterator[int]:
        first_pass, offset = divmod(self._advance, self._count)
        if not self._shuffle:
            own = np.arange(self._start, self._sample_count, self._step)
            return _flatten(itertools.repeat(own), offset)
        passes = self._shuffled_passes(first_pass)
        return _flatten(_one_ahead(passes) if self._sample_count >= BACKGROUND_FROM else passes, offset)

    def _count_entries(self) -> int:
        return len(range(self._start, self._sample_count, self._step))

    def _shuffled_passes(self, first: int) -> Iterator[np.ndarray]:
        raise NotImplementedError


class InfiniteSampler(_EndlessSampler):
    """The dataset again and again; shuffled, each time in another permutation, of which each process takes its slice.

    Args:
        sample_count: length N of the dataset.
        shuffle: draw permutations; otherwise 0..N-1 each time, of which a process sees only `start`, `start + step` ...
        seed: of the permutations, the same for all processes.
        start: first position of this process in each permutation. Default: its rank.
        step: distance between its positions. Default: the number of processes.
        advance: number of entries of this process's sequence to leave out.

    Raises:
        ValueError: a size out of range, or no sample for this process.
    """

    def _shuffled_passes(self, first: int) -> Iterator[np.ndarray]:
        n = self._sample_count
        generator = torch.Generator().manual_seed(self._seed)
        if n >= RANDPERM_64BIT_FROM:
            permutations: Iterator[np.ndarray] = itertools.islice(_permutations_by_loop(n, generator), first, None)
        else:
            n_words = first * n  # that the passes before have drawn
            words = torch.empty(min(n_words, _WORDS_PER_DISCARD), dtype=torch.int32)
            for begin in range(0, n_words, _WORDS_PER_DISCARD):
                words[: n_words - begin].random_(generator=generator)
            permutations = _permutations(n, generator)
        for permutation in permutations:
            yield permutation[self._start :: self._step].copy()  # a copy frees the entries of the other processes


class ShardedInfiniteSampler(_EndlessSampler):
    """The dataset again and again, where each process keeps to its own part of it, so that caches of files work.

    The parts are slices of one permutation and equally large: the remainder of the samples divided by the processes is
    not read. Seed and start are added up, so that seed 0 on rank 1 shuffles like seed 1 on rank 0.

    Args:
        sample_count: length N of the dataset.
        shuffle: deal out the samples at random, and shuffle each part again in each pass; otherwise the part is
            `start`, `start + step`, ... of 0..N-1, without a remainder.
        seed: of the permutations.
        start: number of this process. Default: its rank.
        step: number of processes. Default: as many as there are.
        advance: number of entries of this process's sequence to leave out.
        use_new_shuffle_tensor_slice: shuffle by `torch.randperm` instead of an inside-out Fisher-Yates shuffle.

    Raises:
        ValueError: a size out of range, or no sample for this process.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
        use_new_shuffle_tensor_slice: bool = False,
    ) -> None:
        super().__init__(sample_count=sample_count, shuffle=shuffle, seed=seed, start=start, step=step, advance=advance)
        self._shuffle_shard = _shuffle_by_randperm if use_new_shuffle_tensor_slice else _shuffle_inside_out
        n_left = sample_count % self._step
        if shuffle and n_left:
            warnings.warn(
                f"{sample_count} samples do not divide by {self._step} processes: {n_left} of them are not read",
                stacklevel=2,
            )

    def _count_entries(self) -> int:
        count = super()._count_entries()
        return min(count, self._sample_count // self._step) if self._shuffle else count

    def _shuffled_passes(self, first: int) -> Iterator[np.ndarray]:
        dtype = torch.int32 if self._sample_count <= 2**31 else torch.int64
        generator = torch.Generator().manual_seed(self._seed)
        permutation = torch.randperm(self._sample_count, dtype=dtype, generator=generator)
        shard = permutation.numpy()[self._start :: self._step][: self._count].copy()
        for number in itertools.count(first):
            yield self._shuffle_shard(shard, self._seed + self._start + (number << 24))


def _slice_of_this_process(sample_count: int, start: int | None, step: int | None) -> tuple[int, int]:
    if sample_count < 1:
        raise ValueError(f"sample_count must be at least 1, got {sample_count}: the dataset is empty")
    start = distributed.get_rank() if start is None else start
    step = distributed.get_world_size() if step is None else step
    if start < 0 or step < 1:
        raise ValueError(f"start must be at least 0 and step at least 1, got start={start}, step={step}")
    return start, step


def _flatten(passes: Iterator[np.ndarray], offset: int) -> Iterator[int]:
    for indices in passes:
        for begin in range(offset, len(indices), _CHUNK):
            yield from indices[begin : begin + _CHUNK].tolist()
        offset = 0


def _one_ahead(passes: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    # The next pass is made while this one is read, or a loader would stand still between passes.
    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = pool.submit(next, passes)
        while True:
            current = upcoming.result()
            upcoming = pool.submit(next, passes)
            yield current


def _permutations(n: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    while True:
        yield torch.randperm(n, generator=generator).numpy()
        # The loop below, which defines the order, also draws for the last position, where there is nothing to choose.
        torch.randint(1, (1,), generator=generator)


def _permutations_by_loop(n: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    while True:
        permutation = np.arange(n)
        for i in range(n):
            j = int(torch.randint(i, n, (1,), generator=generator))
            permutation[i], permutation[j] = permutation[j], permutation[i]
        yield permutation


def _shuffle_by_randperm(shard: np.ndarray, seed: int) -> np.ndarray:
    return shard[torch.randperm(len(shard), generator=torch.Generator().manual_seed(seed)).numpy()]


def _shuffle_inside_out(shard: np.ndarray, seed: int) -> np.ndarray:
    # The loop `result[i] = result[j]; result[j] = shard[i]`, j = draws[i], for i = 0, 1, ..., as array operations.
    # Entry i is put into slot j. Whenever a later step draws the slot of an entry, the entry moves to the slot numbered
    # like that step. So it follows a chain of slots, and the ends of all chains are found by doubling.
    n = len(shard)
    draws = _inside_out_draws(n, seed)
    steps = np.argsort(draws, kind="stable")  # grouped by the slot they draw, in order of time
    slots = draws[steps]
    drawn_again = np.append(slots[1:] == slots[:-1], False)
    begins_group = np.insert(~drawn_again[:-1], 0, True)

    next_same_slot = np.full(n, n)  # the next step that draws the slot which step i draws; n: none
    next_same_slot[steps[drawn_again]] = steps[np.flatnonzero(drawn_again) + 1]
    leaves = np.full(n, n)  # the first step that draws slot i: after i, or i itself, whose slot no chain enters
    leaves[slots[begins_group]] = steps[begins_group]

    last = np.where(leaves == n, np.arange(n), leaves)
    while not np.array_equal(last, further := last[last]):
        last = further
    stays = next_same_slot == n
    result = np.empty_like(shard)
    result[np.where(stays, draws, last[np.where(stays, 0, next_same_slot)])] = shard
    return result


def _inside_out_draws(n: int, seed: int) -> np.ndarray:
    # What `torch.randint(0, i + 1)` gives for i = 1..n-1, after a 0 for which nothing is drawn.
    if n >= RANDINT_64BIT_FROM:
        generator = torch.Generator().manual_seed(seed)
        draws = (int(torch.randint(0, i + 1, (1,), generator=generator)) for i in range(1, n))
        return np.fromiter(itertools.chain([0], draws), dtype=np.int64, count=n)
    # No torch function returns all 32 bits of the words that a torch generator draws, but NumPy has the same generator.
    words = np.random.MT19937()
    words.state = cast(Any, np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False))
    return np.append(0, words.random_raw(n - 1).astype(np.int64) % np.arange(2, n + 1))
