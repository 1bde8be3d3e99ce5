"""The order of streamed shards: shared out, shuffled, resumable, and in bounded memory."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from dinov3.data.stream_order import LaneOrder, LaneRequest

UNEVEN = (7, 1, 12, 3, 0, 9, 8, 5, 2, 10)


def lane(number: int = 0, n_lanes: int = 1, *, counts: tuple[int, ...] = UNEVEN, window: int = 4) -> LaneOrder:
    return LaneOrder(np.array(counts), window=window, seed=5, lane=number, n_lanes=n_lanes)


def emitted(order: LaneOrder, first: int, count: int) -> list[int]:
    return order.request(first, count, restart=True).indices


def shard_of(index: int, counts: tuple[int, ...]) -> int:
    return int(np.searchsorted(np.cumsum(counts), index, side="right"))


def test_one_lane_emits_every_sample_once_per_pass_in_another_order() -> None:
    order, n = lane(), sum(UNEVEN)
    passes = [emitted(order, k * n, n) for k in range(3)]
    assert all(sorted(indices) == list(range(n)) for indices in passes)
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize(("counts", "n_lanes"), [((6,) * 8, 4), ((6,) * 8, 8), ((12, 12), 4), ((24,), 4), ((7, 9), 8)])
def test_even_lanes_share_out_the_samples_of_a_pass(counts: tuple[int, ...], n_lanes: int) -> None:
    for pass_number in range(2):
        shares = []
        for number in range(n_lanes):
            order = lane(number, n_lanes, counts=counts)
            shares.append(emitted(order, pass_number * order.pass_length, order.pass_length))
        assert sorted(sum(shares, [])) == list(range(sum(counts)))


def test_a_lane_reads_whole_shards_and_other_ones_in_each_pass() -> None:
    counts = (6,) * 8
    order = lane(1, 4, counts=counts)
    shards = [
        {shard_of(index, counts) for index in emitted(order, k * order.pass_length, order.pass_length)}
        for k in range(4)
    ]
    assert all(len(found) == 2 for found in shards) and len(set(map(frozenset, shards))) > 1


def test_uneven_lanes_have_passes_of_one_length_and_stay_apart() -> None:
    lanes = [lane(number, 4) for number in range(4)]
    assert {order.pass_length for order in lanes} == {sum(UNEVEN) // 4}
    shares = [set(emitted(order, 0, order.pass_length)) for order in lanes]
    assert all(not one & other for one, other in itertools.combinations(shares, 2))


def test_samples_that_a_pass_leaves_out_come_in_another() -> None:
    seen: Counter[int] = Counter()
    for number in range(4):
        order = lane(number, 4)
        seen.update(emitted(order, 0, 30 * order.pass_length))
    assert set(seen) == set(range(sum(UNEVEN)))


@pytest.mark.parametrize("window", [1, 4, 1000])
@pytest.mark.parametrize(("number", "n_lanes"), [(0, 1), (2, 4), (3, 20)])
def test_a_lane_that_restarts_continues(window: int, number: int, n_lanes: int) -> None:
    whole = emitted(lane(number, n_lanes, window=window), 0, 200)
    for first in (0, 1, 3, 56, 57, 58, 113, 150):
        assert emitted(lane(number, n_lanes, window=window), first, 50) == whole[first : first + 50]


def replay(requests: list[LaneRequest]) -> tuple[int, list[int]]:
    # What a worker that does as it is told holds at most, and in which order it reads.
    held: Counter[int] = Counter()
    most, read = 0, []
    for request in requests:
        held.update(request.ahead)
        read += request.ahead
        most = max(most, held.total())
        for index in request.indices:
            assert held[index] > 0, "emitted before it was read"
            held[index] -= 1
    return most, read


@pytest.mark.parametrize("window", [1, 8, 300])
@pytest.mark.parametrize(("number", "n_lanes"), [(0, 1), (2, 4), (7, 20)])
@pytest.mark.parametrize("first", [0, 33])
def test_everything_emitted_was_read_before_and_no_more_than_a_window_is_held(
    window: int, number: int, n_lanes: int, first: int
) -> None:
    order = lane(number, n_lanes, window=window)
    batch = 3
    requests = [order.request(k * batch, batch, restart=k == first) for k in range(first, first + 60)]
    most, _ = replay(requests)
    assert most <= window + batch


def test_shards_are_read_from_front_to_back() -> None:
    order = lane(window=8)
    n = sum(UNEVEN)
    _, read = replay([order.request(k * 3, 3, restart=k == 0) for k in range(60)])
    for begin in range(0, 2 * n, n):
        shards = [list(group) for _, group in itertools.groupby(read[begin : begin + n], lambda i: shard_of(i, UNEVEN))]
        assert sorted(map(len, shards)) == sorted(filter(None, UNEVEN))
        assert all(indices == list(range(indices[0], indices[0] + len(indices))) for indices in shards)


def test_a_window_of_the_whole_pass_is_a_permutation_of_it() -> None:
    n = sum(UNEVEN)
    far = [abs(index - position) for position, index in enumerate(emitted(lane(counts=(n,), window=n), 0, n))]
    near = [abs(index - position) for position, index in enumerate(emitted(lane(counts=(n,), window=4), 0, n))]
    assert max(near) < 4 < max(far)


def test_a_window_is_emitted_in_another_order_in_each_pass_and_than_other_windows() -> None:
    order = lane(counts=(40,), window=20)
    windows = [np.array(emitted(order, first, 20)) % 20 for first in range(0, 160, 20)]
    assert len({tuple(window) for window in windows}) == 8


def test_the_seed_changes_the_order() -> None:
    one, other = (LaneOrder(np.array(UNEVEN), window=8, seed=seed, lane=0, n_lanes=1) for seed in (1, 2))
    assert emitted(one, 0, 57) != emitted(other, 0, 57)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples are too few for 4 workers, of all processes together"):
        lane(0, 4, counts=(3,))
