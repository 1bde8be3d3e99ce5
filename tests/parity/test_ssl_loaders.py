"""Golden cases of the training loaders: what each is built with, for one and several resolutions and students."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dinov3 import distributed
from dinov3.data import CombinedDataLoader
from dinov3.train import data_loading

from . import arch as builder
from . import golden


class Recorder:
    """Stands in for datasets and loaders, and keeps what they would have been made with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaders: list[dict[str, Any]] = []
        self.combined: dict[str, Any] = {}
        monkeypatch.setattr(data_loading, "make_dataset", lambda **settings: settings)
        monkeypatch.setattr(data_loading, "make_train_data_loader", self.make_loader)
        monkeypatch.setattr(data_loading, "CombinedDataLoader", self.combine)

    def make_loader(self, **settings: Any) -> int:
        self.loaders.append(settings)
        return len(self.loaders) - 1

    def combine(self, **settings: Any) -> None:
        self.combined = settings

    combine.GLOBAL_HOMOGENEOUS = CombinedDataLoader.GLOBAL_HOMOGENEOUS  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", golden.cases("ssl", "loader_args/"), ids=lambda case: case["id"])
def test_loaders_are_built_as_published(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "get_world_size", lambda: case["world_size"])
    monkeypatch.setattr(distributed, "get_subgroup_size", lambda: case.get("subgroup_size", case["world_size"]))
    recorder = Recorder(monkeypatch)
    data_loading.build_train_loader(builder.config(case), start_iteration=case["start_iter"])

    expected = case["expected"]
    assert len(recorder.loaders) == len(expected["loaders"])
    for got, want in zip(recorder.loaders, expected["loaders"], strict=True):
        loader = want["loader"]
        assert (got["batch_size"], got["num_workers"]) == (loader["batch_size"], loader["num_workers"])
        assert (got["sampler_seed"], got["sampler_type"].name) == (loader["seed"], loader["sampler_type"])
        assert got["first_batch"] * got["batch_size"] == loader["sampler_advance"]
        check_collate(got["collate_fn"].keywords, want)
        check_dataset(got["dataset"], want["dataset"])
    if expected["combined"]:
        assert [ratio for _, ratio in recorder.combined["loaders_with_ratios"]] == expected["combined"]["ratios"]
        for name in ("batch_size", "combining_mode", "seed", "name"):
            assert recorder.combined[name] == expected["combined"][name], name


def check_collate(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert str(got["dtype"]) == f"torch.{want['collate']['dtype']}"
    assert list(got["mask_ratio_tuple"]) == want["collate"]["mask_ratio_tuple"]
    for name in ("mask_probability", "n_tokens", "random_circular_shift", "local_batch_size"):
        assert got[name] == want["collate"][name], name
    for name, value in want["mask_generator"].items():
        ours = getattr(got["mask_generator"], name)
        assert list(ours) == pytest.approx(value) if isinstance(value, list) else ours == value, name


def check_dataset(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got["dataset_str"] == want["dataset_str"]
    assert got["target_transform"](7) == ()
    augmentation = got["transform"]
    for name, value in want["augmentation"].items():
        assert getattr(augmentation, name) == value, name
    assert math.isclose(sum(augmentation.std), 0.229 + 0.224 + 0.225)
