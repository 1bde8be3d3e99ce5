"""Settings of segmentation that mean nothing are refused by their key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dinov3.eval.command.model import ModelConfig
from dinov3.eval.segmentation.config import (
    DatasetsConfig,
    DecoderConfig,
    EvalConfig,
    EvalTransformConfig,
    SegmentationConfig,
    TrainTransformConfig,
    TransformConfig,
)

BAD: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "word as size": (EvalTransformConfig, {"img_size": "foo"}, "transforms.eval.img_size='foo'"),
    "three sides": (EvalTransformConfig, {"img_size": [1, 2, 3]}, r"transforms.eval.img_size=\[1, 2, 3\]"),
    "no ratio": (EvalTransformConfig, {"tta_ratios": []}, r"transforms.eval.tta_ratios=\[\]"),
    "ratio of nothing": (EvalTransformConfig, {"tta_ratios": [1.0, 0.0]}, "transforms.eval.tta_ratios"),
    "part of a pixel": (TrainTransformConfig, {"img_size": 0.5}, "transforms.train.img_size=0.5"),
    "no side": (TrainTransformConfig, {"img_size": 0}, "transforms.train.img_size=0"),
    "one side of a crop": (TrainTransformConfig, {"crop_size": [48]}, r"transforms.train.crop_size=\[48\]"),
    "empty crop": (TrainTransformConfig, {"crop_size": [48, 0]}, r"transforms.train.crop_size=\[48, 0\]"),
    "one factor": (
        TrainTransformConfig,
        {"random_img_size_ratio_range": [0.5]},
        r"transforms.train.random_img_size_ratio_range=\[0.5\]",
    ),
    "falling factors": (
        TrainTransformConfig,
        {"random_img_size_ratio_range": [2.0, 0.5]},
        "transforms.train.random_img_size_ratio_range",
    ),
    "two channels": (TransformConfig, {"mean": [1.0, 2.0]}, r"transforms.mean=\[1.0, 2.0\]"),
    "no deviation": (TransformConfig, {"std": [1.0, 0.0, 1.0]}, "transforms.std"),
    "no window": (EvalConfig, {"crop_size": 0, "mode": "whole"}, "eval.crop_size=0"),
    "no windows at a time": (EvalConfig, {"max_windows_per_batch": 0}, "eval.max_windows_per_batch=0"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_mean_nothing_are_refused(name: str) -> None:
    section, settings, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        section(**settings)


def test_sizes_may_be_sequences_of_any_kind() -> None:
    TrainTransformConfig(img_size=(48, 64), crop_size=(32, 32), random_img_size_ratio_range=(0.5, 2.0))  # type: ignore[arg-type]
    EvalTransformConfig(img_size=[48, 64], tta_ratios=[0.5])
    TransformConfig(mean=[127.5], std=[127.5])


def test_whole_images_need_no_stride() -> None:
    assert EvalConfig(mode="whole", crop_size=224).stride == 341


@pytest.mark.parametrize(
    ("head", "load_from", "error", "match"),
    [
        ("linaer", None, ValueError, "decoder_head.type='linaer' .did you mean 'linear'"),
        ("linear", "/nowhere/head.pth", FileNotFoundError, "load_from=/nowhere/head.pth"),
        ("linear", "dinov3_vit7b16_m", FileNotFoundError, "did you mean 'dinov3_vit7b16_ms'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_loaded(
    head: str, load_from: str | None, error: type[Exception], match: str
) -> None:
    config = SegmentationConfig(
        model=ModelConfig(dino_hub="dinov3_vits16"),
        datasets=DatasetsConfig(root="/nowhere", train="ADE20K:split=TRAIN", val="ADE20K:split=VAL"),
        decoder_head=DecoderConfig(type=head),
        load_from=load_from,
    )
    with pytest.raises(error, match=match):
        config.check()
