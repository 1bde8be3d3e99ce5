"""Golden cases of the pretraining augmentation: shapes, pixels where nothing is random, and distributions.

The distributions are those of the published method, measured over hundreds of draws; any generator of random numbers
meets them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from . import golden
from .data_images import assert_same_pixels, make_image

MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


def augmentation(case: dict[str, Any]) -> Any:
    return golden.target("dinov3.data.augmentations.DataAugmentationDINO")(**case["kwargs"])


def pixels(view: Tensor) -> Tensor:
    return (view * STD + MEAN).double()


@pytest.mark.parametrize(
    "case", [c for c in golden.cases("data", "aug-") if c["kind"] == "augmentation_shapes"], ids=lambda c: c["id"]
)
def test_shapes_and_keys(case: dict[str, Any]) -> None:
    height, width = case["image_height_width"]
    views = augmentation(case)(Image.new("RGB", (width, height), (10, 100, 200)))
    expect = case["expect"]
    assert sorted(views) == expect["keys"]
    for key in (key for key in expect["keys"] if key in expect):
        assert [list(view.shape) for view in views[key]] == expect[key], key
        assert all(str(view.dtype) == f"torch.{expect['dtype']}" for view in views[key]), key
    assert len(views["offsets"]) == expect["offsets_count"]
    same = [t is g for t, g in zip(views["global_crops_teacher"], views["global_crops"], strict=True)]
    assert all(same) == expect["teacher_is_student_crop"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", golden.cases("data", "aug-det-"), ids=lambda c: c["id"])
def test_pixels_where_nothing_is_random(case: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    views = augmentation(case)(make_image(case["input"]))
    for key, output in case["outputs"].items():
        for view in views[key]:
            assert_same_pixels(view, output, std=case["kwargs"].get("std"))


@pytest.mark.parametrize("case", golden.cases("data", "aug-distribution"), ids=lambda c: c["id"])
def test_distribution_of_distortions(case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    augment, image = augmentation(case), make_image(case["input"])
    original = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
    draws = defaultdict(list)
    for _ in range(case["n"]):
        views = augment(image)
        for name, view in zip(case["expect"], [*views["global_crops"], *views["local_crops"]], strict=True):
            draws[name].append(measure(pixels(view), original))
    for name, want in case["expect"].items():
        assert_shares(draws[name], want, name)
        assert_moments(draws[name], want, name)


def measure(x: Tensor, original: Tensor) -> dict[str, float]:
    gray_of_x, h = x.mean(0) - x.mean(), original.mean(0) - original.mean()
    flipped = abs((gray_of_x * h.flip(-1)).sum()) > abs((gray_of_x * h).sum())
    gray = (x[0] - x[1]).abs().max() < 2e-3 and (x[0] - x[2]).abs().max() < 2e-3
    chroma = (x.amax(0) - x.amin(0)).mean()
    result = {
        "gray": float(gray),
        "blurred": float((x[:, :, 1:] - x[:, :, :-1]).abs().mean() / x.std() < 0.9),
        "flipped": float(flipped),
        "dark": float(x.max() < 0.501),
        "means": x.mean().item(),
        "chroma": chroma.item(),
        "contrast": ((gray_of_x.std() / x.mean()) / (h.std() / original.mean())).item(),
    }
    if not gray:
        reference = original.flip(-1) if flipped else original
        pair = torch.stack([(x[0] - x[1]).flatten(), (reference[0] - reference[1]).flatten()])
        result |= {"saturation": (chroma / gray_of_x.std()).item(), "hue": torch.corrcoef(pair)[0, 1].item()}
    return result


def assert_shares(draws: list[dict[str, float]], want: dict[str, float], view: str) -> None:
    for name in ("gray", "blurred", "flipped", "dark"):
        got = np.mean([draw[name] for draw in draws])
        if want[name] == 0:
            assert got < 0.01, (view, name, got)
            continue
        p = min(max(want[name], 0.01), 0.99)
        assert abs(got - want[name]) <= 5 * math.sqrt(p * (1 - p) / len(draws)) + 0.02, (view, name, got)


def assert_moments(draws: list[dict[str, float]], want: dict[str, float], view: str) -> None:
    for name in ("means", "chroma", "contrast", "saturation", "hue"):
        values = np.array([draw[name] for draw in draws if name in draw])
        mean, std = want[f"mean_of_{name}"], want[f"std_of_{name}"]
        bound = 5 * std / math.sqrt(len(values)) * math.sqrt(2)
        assert abs(values.mean() - mean) <= bound, (view, name, values.mean(), mean, bound)
        assert abs(values.std() - std) <= 0.25 * std, (view, name, values.std(), std)


@pytest.mark.parametrize("case", golden.cases("data", "aug-geometry-"), ids=lambda c: c["id"])
def test_distribution_of_cuts(case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    augment, image = augmentation(case), make_image(case["input"])
    rows = np.array([locate(view, case) for _ in range(case["n"]) for view in augment(image)["global_crops_teacher"]])
    expect = case["expect"]
    mean, std = np.array(expect["mean"]), np.array(expect["std"])
    assert (abs(rows.mean(0) - mean) <= 5 * std / math.sqrt(case["n"])).all(), (rows.mean(0), mean)
    assert (abs(rows.std(0) - std) <= 0.15 * std).all(), (rows.std(0), std)
    for column, name in enumerate(("area", "log_aspect")):
        want = np.array(expect[f"quantiles_{name}"])
        quantiles = np.quantile(rows[:, column], (0.1, 0.5, 0.9))
        assert (abs(quantiles - want) <= 0.06).all(), (name, quantiles, want)


def locate(view: Tensor, case: dict[str, Any]) -> list[float]:
    x = pixels(view)
    columns, rows = x[0].mean(0), x[1].mean(1)
    size, source = view.shape[-1], case["input"]
    width, height = ((c.max() - c.min()).item() * size / (size - 1) for c in (columns, rows))
    log_aspect = math.log(width * source["width"] / (height * source["height"]))
    return [width * height, log_aspect, columns.mean().item(), rows.mean().item(), float(columns[0] > columns[-1])]


def test_constants_of_the_published_method() -> None:
    want = golden.case("data", "aug-probabilities")["expect"]
    ours = golden.target("dinov3.data.augmentations")
    jitter, blur, solarize = want["color_jitter"], want["gaussian_blur"], want["solarize"]
    assert jitter == {
        "p": ours.JITTER_PROBABILITY,
        "brightness": ours.BRIGHTNESS,
        "contrast": ours.CONTRAST,
        "saturation": ours.SATURATION,
        "hue": ours.HUE,
    }
    assert want["grayscale_p"] == ours.GRAYSCALE_PROBABILITY
    assert (blur["kernel_size"], tuple(blur["sigma"])) == (ours.BLUR_KERNEL_SIZE, ours.BLUR_SIGMA)
    assert tuple(blur[f"p_{view}"] for view in ("global_1", "global_2", "local")) == ours.BLUR_PROBABILITIES
    assert tuple(solarize[f"p_{view}"] for view in ("global_1", "global_2")) == ours.SOLARIZE_PROBABILITIES
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    inverted = torch.where(ramp >= solarize["threshold"], 255 - ramp, ramp)
    assert torch.equal(ours._distort(ramp, jitter=False, solarize=1.0), inverted)
    assert want["horizontal_flip_p"] == ours.FLIP_PROBABILITY
    assert tuple(want["ratio"]) == ours.ASPECT_RATIO
