"""Inputs and comparisons of the golden cases of `classification`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity import deterministic, golden


def by_id(*prefixes: str) -> Any:
    """Parametrise over the cases whose id starts with one of `prefixes`."""
    return pytest.mark.parametrize("case", golden.cases("classification", *prefixes), ids=lambda case: case["id"])


def case_of(case_id: str) -> dict[str, Any]:
    return golden.case("classification", case_id)


def make_input(entry: Any) -> Any:
    """An input of a case from its description."""
    kind = entry["kind"]
    if kind in ("ints", "floats"):
        return torch.tensor(entry["values"], dtype=torch.int64 if kind == "ints" else torch.float32)
    name, seed = entry["name"], entry["seed"]
    if kind == "clusters":
        labels = make_input(entry["labels"])
        centers = deterministic.tensor(entry["centers"], (entry["num_classes"], entry["dim"]), seed)
        features = centers[labels] + entry["spread"] * deterministic.tensor(name, (len(labels), entry["dim"]), seed)
        return F.normalize(features, dim=1, eps=1e-12) if entry["normalize"] else features
    shape = tuple(entry["shape"])
    if kind == "tensor":
        return deterministic.tensor(name, shape, seed)
    if kind == "labels":
        return (deterministic.uniform(name, shape, seed) * entry["num_classes"]).floor().long()
    assert kind == "multihot"
    return (deterministic.uniform(name, shape, seed) > entry["threshold"]).long()


def expected(case: dict[str, Any], name: str) -> Tensor:
    """A stored output tensor."""
    output = case["outputs"][name]
    if "tensor" in output:
        return golden.tensors("classification")[output["tensor"]]
    return torch.tensor(output["values"], dtype=getattr(torch, output["dtype"]))


def assert_close(case: dict[str, Any], got: Any, want: Any) -> None:
    """Nested values: numbers within the case's tolerance, all else exactly; `got` may have more keys."""
    if isinstance(want, dict):
        assert set(want) <= {str(key) for key in got}
        by_name = {str(key): value for key, value in got.items()}
        for key, value in want.items():
            assert_close(case, by_name[key], value)
    elif isinstance(want, list):
        assert len(got) == len(want)
        for got_item, want_item in zip(got, want, strict=True):
            assert_close(case, got_item, want_item)
    elif isinstance(want, float):
        assert float(got) == pytest.approx(want, rel=case["rtol"], abs=case["atol"])
    else:
        assert got == want


def assert_tensor(case: dict[str, Any], got: Tensor, name: str) -> None:
    want = expected(case, name)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=case["rtol"], atol=case["atol"])


class Samples:
    """A dataset of tensors, which knows its labels."""

    def __init__(self, samples: Any, labels: Any) -> None:
        self.samples = samples
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index], self.get_target(index)

    def get_target(self, index: int) -> Any:
        target = self.labels[index]
        return target.numpy() if target.ndim else int(target)

    def get_targets(self) -> Any:
        return self.labels.numpy()
