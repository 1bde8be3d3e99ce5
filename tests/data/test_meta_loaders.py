"""Batches drawn from several loaders."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dinov3.data import meta_loaders
from dinov3.data.meta_loaders import CombinedDataLoader, count_draws


class Letters:
    """Endlessly yields (name, 0), (name, 1), ..."""

    def __init__(self, name: str, batch_size: int = 4, length: int | None = None) -> None:
        self.name = name
        self.batch_size = batch_size
        self.length = length

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return ((self.name, number) for number in itertools.islice(itertools.count(), self.length))


def combine(ratios: tuple[float, ...] = (0.2, 0.5, 0.3), **kwargs: Any) -> CombinedDataLoader:
    loaders = [Letters("abcdefgh"[index]) for index in range(len(ratios))]
    arguments = {"batch_size": 4, "combining_mode": CombinedDataLoader.GLOBAL_HOMOGENEOUS} | kwargs
    return CombinedDataLoader(list(zip(loaders, ratios, strict=True)), **arguments)


def names(loader: Any, count: int) -> list[str]:
    return [name for name, _ in itertools.islice(loader, count)]


def test_each_iter_restarts_the_sequence() -> None:
    loader = combine()
    assert names(loader, 50) == names(loader, 50)


def test_loaders_are_drawn_by_their_ratios() -> None:
    counts = np.unique(names(combine(), 4000), return_counts=True)[1]
    assert np.allclose(counts / 4000, (0.2, 0.5, 0.3), atol=0.03)


def test_advance_replays_that_many_draws() -> None:
    assert names(combine(advance=37), 40) == names(combine(), 77)[37:]


def test_counted_draws_are_the_batches_delivered() -> None:
    delivered = names(combine(seed=9), 123)
    assert count_draws((0.2, 0.5, 0.3), 9, 123) == [delivered.count(name) for name in "abc"]
    assert count_draws((2, 5, 3), 9, 123) == count_draws((0.2, 0.5, 0.3), 9, 123)


def test_global_mode_draws_alike_on_all_ranks_and_local_mode_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = {}
    for mode, rank in itertools.product((0, 1), (0, 1)):
        monkeypatch.setattr(meta_loaders.distributed, "get_rank", lambda rank=rank: rank)
        loader = combine(combining_mode=mode)
        sequences[mode, rank] = names(loader, 60)
        assert names(loader, 60) == sequences[mode, rank]
    assert sequences[0, 0] == sequences[0, 1]
    assert sequences[1, 0] != sequences[1, 1]


def test_it_ends_when_the_drawn_loader_has_no_batch_left() -> None:
    loader = CombinedDataLoader([(Letters("a", length=3), 0.5), (Letters("b"), 0.5)], 4, 0)
    assert names(loader, 1000).count("a") == 3
    assert loader.loader_count.tolist()[0] == 3


def test_ratios_that_do_not_add_up_to_one_are_normalised_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dinov3"):
        loader = combine((2, 5, 3))
    assert "add up to 10" in caplog.text
    assert loader.ratios == [0.2, 0.5, 0.3]
    assert names(loader, 50) == names(combine(), 50)


def test_ratios_that_add_up_to_one_pass_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dinov3"):
        combine((0.3, 0.3, 0.3, 0.05, 0.05))
    assert caplog.text == ""


@pytest.mark.parametrize("ratios", [(0.5, 0.0), (1.5, -0.5), (float("nan"), 1.0), (float("inf"), 1.0)])
def test_ratios_must_be_positive(ratios: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        combine(ratios)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"combining_mode": 2}, r"combining_mode=2 .*GLOBAL_HOMOGENEOUS = 0.*LOCAL_HOMOGENEOUS = 1"),
        ({"batch_size": 5}, "loader 0 has batch size 4, the combined loader 5"),
        ({"logging_period": 0}, "logging_period must be at least 1, got 0"),
        ({"advance": -1}, "advance must be at least 0, got -1"),
    ],
)
def test_impossible_arguments_are_refused(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine(**kwargs)


def test_no_loader_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one loader"):
        CombinedDataLoader([], 4)


def test_shares_are_logged_each_period(caplog: pytest.LogCaptureFixture) -> None:
    loader = combine(name="MultiResDL", logging_period=10)
    with caplog.at_level(logging.INFO, "dinov3"):
        drawn = names(loader, 25)
    assert [record.message for record in caplog.records] == [
        f"MultiResDL: shares of the loaders in {n} batches: "
        + ", ".join(f"{drawn[:n].count(name) / n:.3f}" for name in "abc")
        for n in (10, 20)
    ]
    assert loader.loader_count.tolist() == [drawn.count(name) for name in "abc"]
