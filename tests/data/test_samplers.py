"""Orders of reading: every process its share of one order, restartable at any entry."""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dinov3.data import samplers
from dinov3.data.samplers import EpochSampler, InfiniteSampler, ShardedInfiniteSampler


def take(sampler: Any, count: int) -> list[int]:
    return list(itertools.islice(sampler, count))


def new_sharded(**kwargs: Any) -> ShardedInfiniteSampler:
    return ShardedInfiniteSampler(**kwargs, use_new_shuffle_tensor_slice=True)


INFINITE = pytest.mark.parametrize("make", [InfiniteSampler, ShardedInfiniteSampler, new_sharded])
SHUFFLE = pytest.mark.parametrize("shuffle", [False, True])
pytestmark = pytest.mark.filterwarnings("ignore:.*do not divide")


@INFINITE
@SHUFFLE
def test_advance_drops_that_many_entries(make: Callable[..., Any], shuffle: bool) -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        step = int(generator.integers(1, 6))
        count = int(generator.integers(step, 40))
        advance = int(generator.integers(0, 5 * count))
        arguments = {
            "sample_count": count,
            "shuffle": shuffle,
            "seed": int(generator.integers(1000)),
            "start": int(generator.integers(step)),
            "step": step,
        }
        whole = take(make(**arguments), advance + 50)
        assert take(make(**arguments, advance=advance), 50) == whole[advance:], (arguments, advance)


@INFINITE
@SHUFFLE
def test_each_iter_restarts_the_sequence(make: Callable[..., Any], shuffle: bool) -> None:
    sampler = make(sample_count=10, shuffle=shuffle, start=1, step=2, advance=17)
    assert take(sampler, 30) == take(sampler, 30)


def test_processes_share_out_each_permutation() -> None:
    ranks = [iter(InfiniteSampler(sample_count=23, shuffle=True, seed=1, start=r, step=4)) for r in range(4)]
    for _ in range(3):
        parts = [list(itertools.islice(rank, len(range(r, 23, 4)))) for r, rank in enumerate(ranks)]
        assert sorted(itertools.chain(*parts)) == list(range(23))


def test_permutations_differ_between_passes_and_seeds() -> None:
    passes = np.reshape(take(InfiniteSampler(sample_count=50, shuffle=True, seed=1, start=0, step=1), 150), (3, 50))
    other_seed = take(InfiniteSampler(sample_count=50, shuffle=True, seed=2, start=0, step=1), 50)
    assert len({tuple(order) for order in [*passes.tolist(), other_seed]}) == 4


@pytest.mark.parametrize("make", [ShardedInfiniteSampler, new_sharded])
def test_process_keeps_to_its_shard(make: Callable[..., Any]) -> None:
    shards = [take(make(sample_count=24, shuffle=True, seed=1, start=r, step=4), 18) for r in range(4)]
    for shard in shards:
        passes = np.sort(np.reshape(shard, (3, 6)))
        assert (passes == passes[0]).all()
        assert shard[:6] != shard[6:12]
    assert sorted(itertools.chain(*(shard[:6] for shard in shards))) == list(range(24))


def test_shards_are_equally_large_and_the_rest_is_named() -> None:
    with pytest.warns(UserWarning, match="11 samples do not divide by 4 processes: 3 of them"):
        sampler = ShardedInfiniteSampler(sample_count=11, shuffle=True, start=0, step=4)
    assert len(set(take(sampler, 20))) == 2


@pytest.mark.parametrize("seed", [0, 3, 2**33 + 5])
@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_array_operations_equal_the_loops_that_define_the_orders(
    count: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sequences() -> list[list[int]]:
        arguments = {"sample_count": count, "shuffle": True, "seed": seed, "start": 0, "step": 1, "advance": count}
        return [take(make(**arguments), 3 * count) for make in (InfiniteSampler, ShardedInfiniteSampler)]

    fast = sequences()
    monkeypatch.setattr(samplers, "RANDPERM_64BIT_FROM", 0)
    monkeypatch.setattr(samplers, "RANDINT_64BIT_FROM", 0)
    assert sequences() == fast


@pytest.mark.parametrize("count", [1, 2, 3, 17, 500])
def test_inside_out_shuffle_equals_its_loop(count: int) -> None:
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        looped = [0] * count
        for i in range(count):
            j = int(torch.randint(0, i + 1, (1,), generator=generator)) if i > 0 else 0
            looped[i], looped[j] = looped[j], 7 * i
        assert samplers._shuffle_inside_out(7 * np.arange(count), seed).tolist() == looped


@INFINITE
def test_passes_made_in_the_background_are_the_same(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take(make(sample_count=40, shuffle=True, start=0, step=2, advance=5), 100)
    monkeypatch.setattr(samplers, "BACKGROUND_FROM", 1)
    assert take(make(sample_count=40, shuffle=True, start=0, step=2, advance=5), 100) == expected


def test_next_pass_is_made_while_this_one_is_read() -> None:
    first_is_read = threading.Event()
    waited = []

    def passes() -> Iterator[np.ndarray]:
        yield np.array([1, 2])
        waited.append(first_is_read.wait(timeout=10))
        yield np.array([3, 4])
        yield np.array([5, 6])

    entries = samplers._flatten(samplers._one_ahead(passes()), 0)
    assert next(entries) == 1
    first_is_read.set()
    assert [next(entries), next(entries)] == [2, 3]
    entries.close()  # type: ignore[attr-defined]
    assert waited == [True]


def test_epoch_decides_the_order() -> None:
    sampler = EpochSampler(size=20, sample_count=20, shuffle=True, seed=3, start=0, step=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert sorted(sampler) == list(range(20))


def test_epoch_larger_than_the_dataset_repeats_samples_evenly() -> None:
    counts = np.bincount(list(EpochSampler(size=20, sample_count=10, shuffle=True, start=0, step=1)))
    assert counts.tolist() == [2] * 10


@SHUFFLE
def test_length_of_an_epoch_is_its_number_of_entries(shuffle: bool) -> None:
    for size, start, step in itertools.product((1, 5, 12), (0, 1, 6, 20), (1, 3, 8)):
        sampler = EpochSampler(size=size, sample_count=7, shuffle=shuffle, start=start, step=step)
        assert len(sampler) == len(list(sampler)), (size, start, step)


def test_start_and_step_default_to_this_process_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(samplers.distributed, "get_world_size", lambda: 5)
    assert take(InfiniteSampler(sample_count=20), 4) == [2, 7, 12, 17]
    assert take(ShardedInfiniteSampler(sample_count=20), 4) == [2, 7, 12, 17]
    assert list(EpochSampler(size=20, sample_count=20)) == [2, 7, 12, 17]


@pytest.mark.parametrize("make", [InfiniteSampler, ShardedInfiniteSampler])
@SHUFFLE
def test_fewer_samples_than_processes_is_an_error_instead_of_an_endless_wait(
    make: Callable[..., Any], shuffle: bool
) -> None:
    with pytest.raises(ValueError, match=r"process 3 of 4.*3 samples"):
        make(sample_count=3, shuffle=shuffle, start=3, step=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_count": 0}, "dataset is empty"),
        ({"sample_count": 5, "start": -1}, "start=-1"),
        ({"sample_count": 5, "step": 0}, "step=0"),
        ({"sample_count": 5, "advance": -3}, "advance must be at least 0, got -3"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, int], message: str) -> None:
    for make in (InfiniteSampler, ShardedInfiniteSampler):
        with pytest.raises(ValueError, match=message):
            make(**({"start": 0, "step": 1} | arguments))


def test_epoch_of_no_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        EpochSampler(size=0, sample_count=5)


@pytest.mark.parametrize(
    "sampler",
    [
        EpochSampler(size=9, sample_count=9, shuffle=True, start=0, step=1),
        InfiniteSampler(sample_count=9, shuffle=True, start=0, step=1),
        ShardedInfiniteSampler(sample_count=9, shuffle=True, start=0, step=1),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_samplers_can_be_pickled(sampler: Any) -> None:
    assert take(pickle.loads(pickle.dumps(sampler)), 9) == take(sampler, 9)


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for make in (InfiniteSampler, ShardedInfiniteSampler, new_sharded):
        take(make(sample_count=9, shuffle=True, start=0, step=1), 20)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
