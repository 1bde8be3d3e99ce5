"""Golden cases of samplers and combined loaders: exact sequences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from . import golden


@pytest.mark.parametrize(
    "case",
    [case for case in golden.cases("data", "sampler-") if case["kind"] in ("sampler", "sampler_advance")],
    ids=lambda case: case["id"],
)
@pytest.mark.filterwarnings("ignore:.*do not divide")
def test_sampler_sequence(case: dict[str, Any]) -> None:
    sampler = golden.target(case["cls"])(**case["kwargs"])
    if case.get("set_epoch") is not None:
        sampler.set_epoch(case["set_epoch"])
    assert list(itertools.islice(sampler, case["take"])) == case["expect"]["indices"]
    if "len" in case["expect"]:
        assert len(sampler) == case["expect"]["len"]


def test_sampler_types() -> None:
    sampler_type = golden.target("dinov3.data.loaders.SamplerType")
    expected = golden.case("data", "sampler-type")["expect"]["SamplerType"]
    assert {member.name: member.value for member in sampler_type} == expected


class CountingLoader:
    """Yields (name, 0), (name, 1), ..., `length` of them."""

    def __init__(self, name: int, length: int | str, batch_size: int) -> None:
        self.batch_size = batch_size
        self.name = name
        self.length = None if length == "endless" else int(length)

    def __iter__(self) -> Any:
        return ([self.name, item] for item in itertools.islice(itertools.count(), self.length))


@pytest.mark.parametrize("case", golden.cases("data", "combined-loader-"), ids=lambda case: case["id"])
def test_combined_loader_draws(case: dict[str, Any]) -> None:
    combined = golden.target("dinov3.data.meta_loaders.CombinedDataLoader")
    loaders = [CountingLoader(name, length, batch_size=4) for name, length in enumerate(case["loader_lengths"])]
    loader = combined(zip(loaders, case["ratios"], strict=True), batch_size=4, combining_mode=0, seed=case["seed"])
    # One more than asked for, to see whether the loader ended by itself.
    got = list(itertools.islice(loader, case["take"] + 1))
    assert got[: case["take"]] == case["expect"]["loader_and_item"]
    assert (len(got) <= case["take"]) == case["expect"]["ended"]
