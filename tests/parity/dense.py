"""Inputs, models and comparisons of the golden cases of `depth` and `segmentation`, which share one format."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.models.vision_transformer import DinoVisionTransformer
from tests.parity import deterministic, golden

DEFAULT_TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def by_id(area: str, *prefixes: str) -> Any:
    """Parametrise over the cases of an area whose id, without `<area>/`, starts with one of `prefixes`."""
    found = golden.cases(area, *(f"{area}/{prefix}" for prefix in prefixes))
    return pytest.mark.parametrize("case", found, ids=lambda case: case["id"])


def case_of(area: str, name: str) -> dict[str, Any]:
    return golden.case(area, f"{area}/{name}")


def make_input(case: dict[str, Any], name: str) -> Any:
    """An input of a case: what its description computes, or its literal value."""
    entry = case["inputs"][name]
    if "value" in entry:
        return entry["value"]
    function = getattr(deterministic, entry["fn"])
    return entry.get("add", 0.0) + entry.get("mul", 1.0) * function(entry["key"], tuple(entry["shape"]), entry["seed"])


def tiny_vit(area: str, **overrides: Any) -> nn.Module:
    """The small backbone of an area's cases, in evaluation mode."""
    model = DinoVisionTransformer(**{**golden.area(area)["tiny_vit"]["kwargs"], **overrides})
    model.init_weights()
    return model.eval()


def assert_output(case: dict[str, Any], name: str, got: Tensor, tolerance: dict[str, float] | None = None) -> None:
    """A whole output against what the case stores of it, and against its statistics."""
    entry = case["outputs"][name]
    assert list(got.shape) == entry["shape"], (name, got.shape, entry["shape"])
    assert str(got.dtype) == f"torch.{entry['dtype']}", name
    stored = golden.tensors(case["id"].split("/")[0])[entry["key"]]
    part = got if entry["stored"] == "full" else got[_parse_index(entry["stored"])]
    assert part.shape == stored.shape, (name, part.shape, stored.shape)
    if not stored.is_floating_point():
        assert torch.equal(part.cpu(), stored), name
        return
    bounds = tolerance or _tolerance(case)
    atol = bounds["atol"] * max(1.0, entry["absmax"])
    torch.testing.assert_close(
        part.detach().cpu(), stored, rtol=bounds["rtol"], atol=atol, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )
    whole = got.detach().double()
    assert whole.mean().item() == pytest.approx(entry["mean"], rel=bounds["rtol"], abs=atol), name
    assert whole.std(correction=0).item() == pytest.approx(entry["std"], rel=bounds["rtol"], abs=atol), name


def assert_expected(case: dict[str, Any], got: Any, want: Any, where: str = "") -> None:
    """Nested inline values: floats within the tolerance, everything else exactly."""
    if isinstance(want, dict):
        assert {str(key) for key in got} == set(want), where
        for key, value in got.items():
            assert_expected(case, value, want[str(key)], f"{where}.{key}")
    elif isinstance(want, list):
        assert len(got) == len(want), where
        for index, (got_item, want_item) in enumerate(zip(got, want, strict=True)):
            assert_expected(case, got_item, want_item, f"{where}[{index}]")
    elif isinstance(want, float) or want in ("nan", "inf", "-inf"):
        _assert_number(case, float(got), float(want), where)
    else:
        assert got == want, (where, got, want)


def _assert_number(case: dict[str, Any], got: float, want: float, where: str) -> None:
    if math.isnan(want) or math.isinf(want):
        assert repr(got) == repr(want), where
        return
    bounds = _tolerance(case)
    assert got == pytest.approx(want, rel=bounds["rtol"], abs=bounds["atol"] * max(1.0, abs(want))), where


def _tolerance(case: dict[str, Any]) -> dict[str, float]:
    return case.get("tol", DEFAULT_TOLERANCE)


def _parse_index(text: str) -> tuple[Any, ...]:
    def parse(part: str) -> Any:
        if ":" not in part:
            return int(part)
        return slice(*(int(bound) if bound.strip() else None for bound in part.split(":")))

    return tuple(parse(part.strip()) for part in text.split(","))
