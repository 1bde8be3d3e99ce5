"""Golden cases of the transforms that belong to the published weights."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from dinov3.hub.transforms import make_transform, normalization_of

from . import backbones_runner, golden


@pytest.mark.parametrize("case", golden.cases("backbones", "transform."), ids=lambda c: c["id"])
def test_outputs_equal_the_published_method(case: dict[str, Any]) -> None:
    recipe, data = case["recipe"], case["id"].split(".")[1]
    assert [list(values) for values in normalization_of(data)] == [recipe["mean"], recipe["std"]]
    pixels = backbones_runner.make_inputs(case)["image"]
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    for size in (recipe["resize"], recipe["resize"][0]):
        transform = make_transform(size, weights=data, order=recipe["order"])
        backbones_runner.compare(case, {"y": transform(picture)})
        backbones_runner.compare(case, {"y": transform(pixels)})
