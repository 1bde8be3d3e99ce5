"""Golden cases of the evaluation transforms: uint8 pixels of the published evaluations, and the constants."""

from __future__ import annotations

from typing import Any

import pytest
from torchvision.transforms.v2 import InterpolationMode

from . import golden
from .data_images import assert_same_pixels, make_image


@pytest.mark.parametrize("case", golden.cases("data", "eval-"), ids=lambda c: c["id"])
def test_eval_transform(case: dict[str, Any]) -> None:
    kwargs = dict(case["kwargs"])
    if "interpolation" in kwargs:
        kwargs["interpolation"] = InterpolationMode(kwargs["interpolation"])
    image = golden.target(case["call"])(**kwargs)(make_image(case["input"]))
    assert_same_pixels(image, case["outputs"]["image"], std=kwargs.get("std"))


def test_constants() -> None:
    want = dict(golden.case("data", "transform-constants")["expect"])
    for name in want.pop("interpolation_names"):
        assert InterpolationMode(name).value == name
    for name, value in want.items():
        got = golden.target(f"dinov3.data.transforms.{name}")
        assert got == (tuple(value) if isinstance(value, list) else value), name
