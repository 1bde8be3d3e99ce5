"""Settings of segmentation that mean nothing are refused by their key."""

from __future__ import annotations

import pytest

from dinov3.eval.command.config import parse_arguments
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

BAD = {
    "transforms.eval.img_size=foo": "transforms.eval.img_size='foo'",
    "transforms.eval.img_size=[1,2,3]": r"transforms.eval.img_size=\[1, 2, 3\]",
    "transforms.eval.tta_ratios=[]": r"transforms.eval.tta_ratios=\[\]",
    "transforms.eval.tta_ratios=[1.0,0.0]": "transforms.eval.tta_ratios=.* more than 0",
    "transforms.train.img_size=0.5": "transforms.train.img_size=0.5",
    "transforms.train.img_size=0": "transforms.train.img_size=0",
    "transforms.train.crop_size=[48]": r"transforms.train.crop_size=\[48\]: must have 2 entries",
    "transforms.train.crop_size=[48,0]": r"transforms.train.crop_size=\[48, 0\]: must be at least 1",
    "transforms.train.random_img_size_ratio_range=[0.5]": r"random_img_size_ratio_range=\[0.5\]",
    "transforms.train.random_img_size_ratio_range=[2.0,0.5]": "expected the smallest factor, then the largest",
    "transforms.mean=[1.0,2.0]": r"transforms.mean=\[1.0, 2.0\]",
    "transforms.std=[1.0,0.0,1.0]": "transforms.std",
    "eval.crop_size=0": "eval.crop_size=0: must be at least 1",
    "eval.max_windows_per_batch=0": "eval.max_windows_per_batch=0",
    "eval.mode=slid": "did you mean 'slide'",
    "eval.stride=513": "eval.stride=513 must be at most eval.crop_size=512",
    "metric_to_save=miou": "metric_to_save=miou: expected one of mIoU, acc",
    "bs=0": "bs=0: must be at least 1",
}


@pytest.mark.parametrize("token", BAD)
def test_settings_that_mean_nothing_are_refused(token: str) -> None:
    with pytest.raises(ValueError, match=BAD[token]):
        parse_arguments(["datasets.root=DIR", token], SegmentationConfig)


def test_sizes_may_be_sequences_of_any_kind() -> None:
    train = TrainTransformConfig(img_size=(48, 64), crop_size=(32, 32), random_img_size_ratio_range=(0.5, 2.0))  # type: ignore[arg-type]
    evaluation = EvalTransformConfig(img_size=[48, 64], tta_ratios=[0.5])
    SegmentationConfig(transforms=TransformConfig(train=train, eval=evaluation, mean=[127.5], std=[127.5]))


def test_whole_images_need_no_stride() -> None:
    assert SegmentationConfig(eval=EvalConfig(mode="whole", crop_size=224)).eval.stride == 341


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
