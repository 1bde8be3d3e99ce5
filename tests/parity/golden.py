"""Golden cases: the JSON of an area, its tensors, and one comparison."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .targets import resolve

HERE = Path(__file__).parent


@functools.cache
def area(name: str) -> dict[str, Any]:
    """The whole JSON of ``name``, e.g. ``"ssl"``."""
    return json.loads((HERE / f"{name}.json").read_text())


@functools.cache
def tensors(name: str) -> dict[str, Tensor]:
    """All stored tensors of area ``name`` (empty where the area has none)."""
    path = HERE / f"{name}.safetensors"
    return load_file(path) if path.exists() else {}


def cases(name: str, *prefixes: str) -> list[dict[str, Any]]:
    """The cases of an area whose id starts with one of ``prefixes`` (all without prefixes); never empty."""
    found = [case for case in area(name)["cases"] if not prefixes or case["id"].startswith(prefixes)]
    if not found:
        raise ValueError(f"no golden case of {name!r} starts with {prefixes}")
    return found


def case(name: str, case_id: str) -> dict[str, Any]:
    """The case with exactly this id."""
    return next(c for c in area(name)["cases"] if c["id"] == case_id)


def target(path: str) -> Any:
    """The object at a dotted path of the release, wherever it lives here."""
    parts = resolve(path).split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name is None or not ".".join(parts[:cut]).startswith(error.name):
                raise
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(path)


def assert_near(got: Tensor, want: Tensor, *, relative_to_max: float, name: str = "") -> None:
    """``max |got - want| <= relative_to_max * max |want|`` and equal shapes."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, golden has {tuple(want.shape)}"
    if want.numel() == 0:
        return
    difference = (got.double() - want.double()).abs().max().item()
    bound = relative_to_max * max(want.double().abs().max().item(), torch.finfo(torch.float32).tiny)
    assert difference <= bound, f"{name}: max difference {difference:.3g} > {bound:.3g}"
