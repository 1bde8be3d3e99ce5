"""In which order shards are read from front to back by many workers, and how their samples are shuffled.

The workers of all processes are numbered consecutively: worker w of n on rank r is lane r * n + w. In each pass over
the data the shards are shuffled and dealt out to the lanes; with fewer shards than lanes, each lane takes every k-th
sample of all shards. A lane is thus a stream of samples, in the order in which they lie in its shards. It is cut into
windows, and each window is emitted in a random order.

Notable:
- Everything is a function of (seed, pass, lane, position), so that a run is resumed without replaying anything.
- A pass has equally many samples for every lane, so that all processes begin the next one together: a lane with more
  samples leaves some out, others in each pass, and one with fewer starts again at its first shard.
- Before a sample is emitted, the stream has been read to one window beyond its own position. A worker then holds one
  window at any time, and reads as many samples as it emits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class LaneRequest(NamedTuple):
    """The work of a lane for one batch.

    Attributes:
        indices: samples to emit, in order.
        ahead: samples to read and hold before that, in the order of the stream.
    """

    indices: list[int]
    ahead: list[int]


class LaneOrder:
    """The order of one lane.

    Args:
        counts: samples of each shard, in the order of their indices in the dataset.
        window: number of samples that are shuffled among each other.
        seed: the same for all lanes.
        lane: number of this one.
        n_lanes: number of lanes of all processes.

    Raises:
        ValueError: fewer samples than lanes.
    """

    def __init__(self, counts: np.ndarray, *, window: int, seed: int, lane: int, n_lanes: int) -> None:
        self._counts = np.asarray(counts, dtype=np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        self._window = window
        self._seed = seed
        self._lane = lane
        self._n_lanes = n_lanes
        # Rounded down, so that it is the same for every lane.
        self.pass_length = int(self._counts.sum()) // n_lanes
        if self.pass_length < 1:
            raise ValueError(
                f"{self._counts.sum()} samples are too few for {n_lanes} workers, of all processes together: "
                "use fewer workers"
            )
        self._own_of_pass: tuple[int, _OwnSamples] | None = None
        self._order_of_window: tuple[int, int, np.ndarray] | None = None

    def request(self, first: int, count: int, *, restart: bool) -> LaneRequest:
        """Return what the lane emits, and reads before that, for its emissions `first` to `first + count`.

        Args:
            first: number of the first emission, counted through all passes.
            count: number of emissions.
            restart: whether nothing is held yet, as at the start and after a resume; otherwise the lane holds what the
                request for the emissions just before `first` asked for.
        """
        positions = []
        for number in range(first, first + count):
            begin, order = self._window_of(number)
            positions.append(begin + int(order[number - begin]))
        horizon = first + count + self._window
        to_read: Iterable[int] = range(first + self._window, horizon)
        if restart:
            begin, order = self._window_of(first)
            not_emitted = sorted((begin + order[first - begin :]).tolist())
            to_read = itertools.chain(not_emitted, range(begin + len(order), horizon))
        return LaneRequest(self._find_indices(positions), self._find_indices(to_read))

    def _window_of(self, number: int) -> tuple[int, np.ndarray]:
        # The first position of the window of an emission, and the order in which its positions are emitted.
        pass_number, within = divmod(number, self.pass_length)
        window = within // self._window
        if self._order_of_window is None or self._order_of_window[:2] != (pass_number, window):
            size = min(self._window, self.pass_length - window * self._window)
            # Lanes count from 1 here: NumPy pads keys with zeros, and the shards of the pass are drawn by (pass,).
            order = self._generator(pass_number, self._lane + 1, window).permutation(size)
            self._order_of_window = (pass_number, window, order)
        return pass_number * self.pass_length + window * self._window, self._order_of_window[2]

    def _find_indices(self, positions: Iterable[int]) -> list[int]:
        indices = []
        for position in positions:
            pass_number, within = divmod(position, self.pass_length)
            indices.append(self._own(pass_number).index_of(within))
        return indices

    def _own(self, pass_number: int) -> _OwnSamples:
        if self._own_of_pass is None or self._own_of_pass[0] != pass_number:
            shards = self._generator(pass_number).permutation(np.flatnonzero(self._counts))
            strided = len(shards) < self._n_lanes
            if not strided:
                shards = shards[self._lane :: self._n_lanes]
            own = _OwnSamples(
                starts=self._starts[shards],
                ends=np.cumsum(self._counts[shards]),
                first=self._lane if strided else 0,
                step=self._n_lanes if strided else 1,
            )
            self._own_of_pass = (pass_number, own)
        return self._own_of_pass[1]

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *key])


class _OwnSamples(NamedTuple):
    # The samples of a lane in one pass: every `step`-th sample of these shards, starting with number `first`.
    starts: np.ndarray  # index of each shard's first sample
    ends: np.ndarray  # number of samples up to the end of each shard
    first: int
    step: int

    def index_of(self, number: int) -> int:
        position = (self.first + number * self.step) % int(self.ends[-1])
        shard = int(np.searchsorted(self.ends, position, side="right"))
        before = int(self.ends[shard - 1]) if shard else 0
        return int(self.starts[shard]) + position - before
