"""Golden cases, sizes and state dicts of the ConvNeXts."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from dinov3.models.convnext import ConvNeXt, convnext_sizes, get_convnext_arch

from . import backbones_runner, golden
from .state_dicts import assert_matches_manifest


@pytest.mark.parametrize("case", golden.cases("backbones", "convnext"), ids=lambda c: c["id"])
def test_outputs_equal_the_published_method(case: dict[str, Any]) -> None:
    backbones_runner.check(case)


@pytest.mark.parametrize("size", convnext_sizes)
def test_sizes_and_state_dict(size: str) -> None:
    with torch.device("meta"):
        model = get_convnext_arch(f"convnext_{size}")()
    want = golden.area("backbones")["facts"]["hub_entries"][f"dinov3_convnext_{size}:LVD1689M"]
    got = {name: getattr(model, name) for name in want if name not in ("parameters", "state_dict_entries")}
    got["parameters"] = sum(p.numel() for p in model.parameters())
    got["state_dict_entries"] = len(model.state_dict())
    assert got == want
    assert_matches_manifest(model, f"dinov3_convnext_{size}")


def test_constructor_defaults() -> None:
    want = golden.area("backbones")["facts"]["constructor_defaults"]["ConvNeXt"]
    parameters = inspect.signature(ConvNeXt).parameters.values()
    assert {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD} == want
