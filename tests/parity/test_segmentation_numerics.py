"""Golden cases of `segmentation`: schedules, transforms and the reduction of labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as F_v1
from torchvision.transforms import v2

from dinov3.eval.segmentation import transforms
from dinov3.eval.segmentation.metrics import preprocess_nonzero_labels
from tests.parity import golden
from tests.parity.dense import assert_expected, assert_output, by_id, make_input

BILINEAR, NEAREST = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.NEAREST


@by_id("segmentation", "metrics/reduce-zero-label")
def test_labels_without_zero(case: dict[str, Any]) -> None:
    for name, want in case["expected"].items():
        label = torch.tensor([0, 1, 2, 77, 149, 150, 254, 255], dtype=getattr(torch, name.removeprefix("torch.")))
        before = label.clone()
        got = preprocess_nonzero_labels(label)
        assert got.tolist() == want and got.dtype == label.dtype and torch.equal(label, before)


@by_id("segmentation", "scheduler/")
def test_schedules(case: dict[str, Any]) -> None:
    build_scheduler = golden.target("dinov3.eval.segmentation.schedulers.build_scheduler")
    scheduler_type, _, lr, total_iter, kwargs = case["build"]["args"]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr, betas=(0.9, 0.999))
    kwargs = {**kwargs, "final_div_factor": float(kwargs["final_div_factor"])}
    scheduler = build_scheduler(scheduler_type, optimizer, lr, total_iter, kwargs)
    rates = []
    for _ in range(total_iter):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    kept = range(total_iter) if total_iter == 40 else [*range(0, total_iter, 500), total_iter - 1]
    assert_output(case, "lr", torch.tensor(rates, dtype=torch.float64)[list(kept)])
    assert optimizer.param_groups[0]["betas"][0] == case.get("expected", {}).get("beta1_untouched", 0.9)


def pil_pair(case: dict[str, Any]) -> tuple[Image.Image, Image.Image]:
    image = (255 * make_input(case, "img_u")).to(torch.uint8).numpy()
    return Image.fromarray(image), Image.fromarray(make_input(case, "label_u").to(torch.uint8).numpy())


def blank(width: int, height: int) -> tuple[Image.Image, Image.Image]:
    return Image.new("RGB", (width, height)), Image.new("L", (width, height))


@by_id("segmentation", "transform/fixed-side-resize")
def test_resize_by_the_shorter_side(case: dict[str, Any]) -> None:
    got = {}
    for name in case["expected"]["sizes"]:
        size, small = name.split("->")
        resize = transforms.FixedSideResize(int(small), BILINEAR, NEAREST)
        image, label = resize(*blank(*map(int, size.split("x"))))
        assert image.size == label.size
        got[name] = list(image.size)
    assert_expected(case, got, case["expected"]["sizes"])


@by_id("segmentation", "transform/tta-sizes")
def test_sizes_of_the_copies(case: dict[str, Any]) -> None:
    transform = transforms.make_segmentation_eval_transforms(inference_mode="slide", use_tta=True, **case["kwargs"])
    images, label = transform(*blank(640, 480))
    assert [list(image.shape) for image in images] == case["expected"]["shapes"]
    assert list(label.shape) == case["expected"]["label_shape"]


@by_id("segmentation", "transform/eval-")
def test_evaluation_transform(case: dict[str, Any]) -> None:
    images, label = transforms.make_segmentation_eval_transforms(**case["kwargs"])(*pil_pair(case))
    got = {"number_of_images": len(images), "label_dtype": str(label.dtype)}
    assert_expected(case, got, case["expected"])
    assert_output(case, "label", label)
    for name in case["outputs"].keys() - {"label"}:
        assert_output(case, name, images[int(name.removeprefix("img"))])


@by_id("segmentation", "transform/train-deterministic")
def test_training_pieces(case: dict[str, Any]) -> None:
    pair: Any = pil_pair(case)
    for step in (
        transforms.MaskToTensor(),
        transforms.CustomResize(32, BILINEAR, NEAREST),
        transforms.PILToTensor(),
        transforms.ReduceZeroLabel(),
    ):
        pair = step(*pair)
    assert_output(case, "uint8_img", pair[0])
    assert_output(case, "label", pair[1])
    for step in (
        transforms.NormalizeImage(transforms.MEAN, transforms.STD),
        transforms.PadTensor(case["kwargs"]["pad_shape"]),
    ):
        pair = step(*pair)
    assert_output(case, "img", pair[0])
    assert_output(case, "padded_label", pair[1])


@by_id("segmentation", "transform/photometric-pieces")
def test_photometric_pieces(case: dict[str, Any]) -> None:
    image = (255 * make_input(case, "img_u")).to(torch.uint8)
    convert = transforms.PhotoMetricDistortion().convert
    assert_output(case, "alpha", convert(image, alpha=1.37))
    assert_output(case, "beta_down", convert(image, beta=-21.6))
    assert_output(case, "beta_up", convert(image, beta=30.9))
    channels_first = image.permute(2, 0, 1)
    assert_output(case, "saturation", F_v1.adjust_saturation(channels_first, 1.4))
    assert_output(case, "hue", F_v1.adjust_hue(channels_first, -0.31))


@by_id("segmentation", "transform/crop-smaller-image")
def test_crop_of_a_smaller_image(case: dict[str, Any]) -> None:
    image, label = torch.zeros(3, 48, 64), torch.from_numpy(np.zeros((1, 48, 64), dtype=np.uint8))
    got = transforms.RandomCropWithLabel(case["kwargs"]["crop_size"])(image, label)
    assert [list(x.shape) for x in got] == case["expected"]["shapes"]
