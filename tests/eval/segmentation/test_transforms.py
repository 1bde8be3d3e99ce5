"""Transforms of images and label maps: what moves together, which crops are taken, how colours are distorted."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from dinov3.eval.segmentation import transforms
from dinov3.eval.segmentation.transforms import (
    CustomResize,
    FixedSideResize,
    MaskToTensor,
    PadTensor,
    PhotoMetricDistortion,
    RandomCropWithLabel,
    ResizeV2,
    make_segmentation_eval_transforms,
    make_segmentation_train_transforms,
)


def label_array(height: int, width: int) -> np.ndarray:
    """Labels 1 to 200, other ones in neighbouring pixels."""
    return (1 + np.arange(height * width) % 200).reshape(height, width).astype(np.uint8)


def pair(height: int = 48, width: int = 64) -> tuple[Image.Image, Image.Image]:
    """A label map and an image whose channels are the labels."""
    label = label_array(height, width)
    return Image.fromarray(np.stack([label] * 3, axis=-1)), Image.fromarray(label)


def noise(height: int = 24, width: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator).to(torch.uint8)


def without_distortion(transform: v2.Compose) -> v2.Compose:
    return v2.Compose([step for step in transform.transforms if not isinstance(step, PhotoMetricDistortion)])


@pytest.mark.parametrize(
    ("mode", "dtype"), [("L", torch.uint8), ("P", torch.uint8), ("I", torch.int32), ("I;16", torch.int32)]
)
def test_labels_come_in_many_modes(mode: str, dtype: torch.dtype) -> None:
    array = label_array(6, 5).astype({"I": np.int32, "I;16": np.uint16}.get(mode, np.uint8))
    label = Image.fromarray(array)
    if mode == "P":
        label.putpalette([0] * 768)
    assert label.mode == mode
    _, tensor = MaskToTensor()(None, label)
    assert tensor.dtype == dtype and tensor.shape == (1, 6, 5)
    assert np.array_equal(tensor[0].numpy(), array)


def test_class_ids_above_255_survive_a_training_transform() -> None:
    label = Image.fromarray(np.full((20, 20), 1000, dtype=np.uint16))
    _, tensor = make_segmentation_train_transforms(img_size=16, crop_size=(24, 24), reduce_zero_label=True)(
        Image.new("RGB", (20, 20)), label
    )
    assert set(tensor.flatten().tolist()) == {999, 255}


def test_a_label_map_in_memory_is_copied() -> None:
    array = label_array(6, 5)
    MaskToTensor()(None, array)[1].zero_()
    assert np.array_equal(array, label_array(6, 5))


def test_labels_of_colours_or_fractions_are_refused() -> None:
    with pytest.raises(ValueError, match="label map has one channel.*'RGB'"):
        MaskToTensor()(None, Image.new("RGB", (4, 4)))
    with pytest.raises(TypeError, match="class ids, got torch.float32"):
        MaskToTensor()(None, np.zeros((4, 4)))


@pytest.mark.parametrize("size", [(48, 65), (24, 32)])
def test_training_refuses_a_label_map_of_another_size(size: tuple[int, int]) -> None:
    transform = make_segmentation_train_transforms(img_size=32)
    with pytest.raises(ValueError, match=f"image is 48 x 64 .* label map {size[0]} x {size[1]}"):
        transform(pair()[0], pair(*size)[1])


def test_image_and_label_move_together() -> None:
    transform = without_distortion(
        make_segmentation_train_transforms(crop_size=(20, 30), flip_prob=0.5, mean=(0, 0, 0), std=(1, 1, 1))
    )
    corners, orders = set(), set()
    for seed in range(16):
        torch.manual_seed(seed)
        image, label = transform(*pair())
        assert image.dtype == torch.float32 and label.dtype == torch.uint8
        assert torch.equal(image[0], label[0].float())
        corners.add(int(label[0, 0, 0]))
        orders.add(int(label[0, 0, 1]) - int(label[0, 0, 0]))
    assert len(corners) > 8 and orders == {1, -1}


def test_flip_probability() -> None:
    never, always = (without_distortion(make_segmentation_train_transforms(flip_prob=p)) for p in (0.0, 1.0))
    assert torch.equal(always(*pair())[1], never(*pair())[1].flip(-1))
    with pytest.raises(ValueError, match="flip_prob is a probability.*got 1.5"):
        make_segmentation_train_transforms(flip_prob=1.5)


def test_the_shorter_side_is_drawn_and_the_longer_one_rounded() -> None:
    resize = CustomResize(40, random_img_size_ratio_range=(0.5, 2.0))
    sizes = set()
    for seed in range(200):
        torch.manual_seed(seed)
        image, label = resize(pair()[0], MaskToTensor()(*pair())[1])
        height, width = image.height, image.width
        assert 20 <= height < 80 and width == int(height * 64 / 48 + 0.5)
        assert label.shape == (1, height, width)
        sizes.add(height)
    assert min(sizes) < 25 and max(sizes) > 74
    assert CustomResize([30, 50])(*pair())[0].size == (50, 30)
    assert CustomResize(32)(*pair(64, 48))[0].size == (32, 43)


def test_a_ratio_of_no_size_is_refused() -> None:
    with pytest.raises(ValueError, match="random_img_size_ratio_range multiplies img_size"):
        make_segmentation_train_transforms(random_img_size_ratio_range=(0.5, 2.0))


def test_resized_labels_are_labels_that_were_there() -> None:
    label = np.where(np.arange(64) < 32, 3, 200)[None].repeat(48, axis=0).astype(np.uint8)
    for resize in (CustomResize(31), FixedSideResize(31), ResizeV2([31, 41])):
        for kind in (Image.fromarray(label), MaskToTensor()(None, label)[1], label):
            assert set(np.unique(np.asarray(resize(pair()[0], kind)[1]))) == {3, 200}


def share_of_class(label: Tensor) -> float:
    counts = label[label != 255].unique(return_counts=True)[1]
    return float(counts.max() / counts.sum())


def test_crops_of_nearly_one_class_are_avoided() -> None:
    label = torch.ones(1, 40, 400, dtype=torch.uint8)
    label[..., 300:] = 2
    crop = RandomCropWithLabel((40, 60))
    shares = []
    for seed in range(200):
        torch.manual_seed(seed)
        shares.append(share_of_class(crop(torch.zeros(3, 40, 400), label)[1]))
    # A crop is mixed enough with probability 0.09: eleven draws find one in 63 percent of the cases.
    mixed = sum(share < 0.75 for share in shares) / len(shares)
    assert 0.5 < mixed < 0.75


def test_three_quarters_of_one_class_is_too_much() -> None:
    crop = RandomCropWithLabel((1, 4))
    assert not crop._is_mixed(torch.tensor([[[1, 1, 1, 2]]]))
    assert crop._is_mixed(torch.tensor([[[1, 1, 2, 2]]]))
    assert not crop._is_mixed(torch.tensor([[[1, 1, 255, 255]]]))
    assert not crop._is_mixed(torch.tensor([[[1, 1, 1, 2, 255, 255, 255, 255]]]))
    assert not crop._is_mixed(torch.full((1, 1, 4), 255))


def test_ten_crops_are_rejected_and_the_eleventh_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    crop = RandomCropWithLabel((2, 2))
    draws = []
    draw = crop._draw
    monkeypatch.setattr(crop, "_draw", lambda size: draws.append(size) or draw(size))
    image, label = crop(torch.zeros(3, 8, 8), torch.ones(1, 8, 8, dtype=torch.uint8))
    assert len(draws) == 11 and image.shape == (3, 2, 2) and label.shape == (1, 2, 2)


def test_crops_lie_everywhere() -> None:
    label = (torch.arange(6)[:, None] * 10 + torch.arange(7))[None].to(torch.uint8)
    seen = set()
    for seed in range(400):
        torch.manual_seed(seed)
        seen.add(int(RandomCropWithLabel((4, 4))(torch.zeros(3, 6, 7), label)[1][0, 0, 0]))
    assert seen == {10 * row + column for row in range(3) for column in range(4)}


def test_one_number_is_a_square_crop() -> None:
    image, _ = make_segmentation_train_transforms(crop_size=32)(*pair())
    assert image.shape == (3, 32, 32)


def test_smaller_images_are_padded_after_the_normalisation() -> None:
    image, label = make_segmentation_train_transforms(crop_size=(60, 70), mean=(9, 9, 9), std=(2, 2, 2))(*pair())
    assert image.shape == (3, 60, 70) and label.shape == (1, 60, 70) and label.dtype == torch.uint8
    outside = torch.ones(60, 70, dtype=torch.bool)
    outside[:48, :64] = False
    assert (image[:, outside] == 0).all() and (label[:, outside] == 255).all()
    assert (label[:, ~outside] != 255).all()


def test_padding_cuts_what_is_larger() -> None:
    image, label = PadTensor((4, 9))(torch.ones(3, 6, 5), torch.ones(1, 6, 5, dtype=torch.uint8))
    assert image.shape == (3, 4, 9) and label.shape == (1, 4, 9)
    assert int(image.sum()) == 3 * 4 * 5


def test_zero_becomes_ignore_before_the_crop() -> None:
    image, label = Image.new("RGB", (8, 8)), np.ones((8, 8), dtype=np.uint8)
    label[0] = 0
    transform = make_segmentation_train_transforms(reduce_zero_label=True)
    assert transform(image, Image.fromarray(label))[1][0, :2, 0].tolist() == [255, 0]
    steps = [
        type(step).__name__
        for step in make_segmentation_train_transforms(img_size=8, crop_size=8, reduce_zero_label=True).transforms
    ]
    assert steps.index("ReduceZeroLabel") < steps.index("RandomCropWithLabel")


def test_distorted_images_are_whole_numbers_in_float32() -> None:
    image = noise()
    for seed in range(30):
        torch.manual_seed(seed)
        distorted, label = PhotoMetricDistortion()(image, "label")
        assert label == "label" and distorted.dtype == torch.float32
        assert torch.equal(distorted, distorted.round())
        assert distorted.min() >= 0 and distorted.max() <= 255


def test_values_are_cut_off_and_not_rounded() -> None:
    image = torch.tensor([0, 10, 101, 250], dtype=torch.uint8)
    convert = PhotoMetricDistortion().convert
    assert convert(image, alpha=1.19).tolist() == [0, 11, 120, 255]
    assert convert(image, beta=-1.5).tolist() == [0, 8, 99, 248]
    assert convert(image.numpy(), beta=7.9).tolist() == [7, 17, 108, 255]


def only(**ranges: Any) -> PhotoMetricDistortion:
    """A distortion where everything but `ranges` is the identity."""
    neutral = {"brightness_delta": 0, "contrast_range": (1, 1), "saturation_range": (1, 1), "hue_range": (0, 0)}
    return PhotoMetricDistortion(**{**neutral, **ranges})


@pytest.mark.parametrize(
    "distortion",
    [
        only(brightness_delta=32),
        only(contrast_range=(0.5, 0.9)),
        only(saturation_range=(0.1, 0.5)),
        only(hue_range=(0.2, 0.4)),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_each_change_happens_to_half_of_the_images(distortion: PhotoMetricDistortion) -> None:
    image = noise(4, 4)
    torch.manual_seed(0)
    changed = sum(not torch.equal(distortion(image, None)[0], image.float()) for _ in range(400))
    assert 160 < changed < 240


def test_brightness_and_contrast_fill_their_ranges() -> None:
    gray = torch.full((3, 1, 1), 100, dtype=torch.uint8)
    torch.manual_seed(0)
    added = [int(PhotoMetricDistortion(contrast_range=(1, 1))(gray, None)[0][0]) - 100 for _ in range(800)]
    assert -33 <= min(added) < -28 and 28 < max(added) <= 32
    factors = [float(only(contrast_range=(0.5, 1.5))(gray, None)[0][0]) / 100 for _ in range(800)]
    assert 0.49 <= min(factors) < 0.55 and 1.45 < max(factors) <= 1.5


def test_contrast_comes_before_or_after_the_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    distortion = PhotoMetricDistortion()
    orders = set()
    for first in (True, False):
        calls: list[str] = []
        happens = iter([True, first, *[True] * 3])
        monkeypatch.setattr(transforms, "_happens", lambda probability=0.5, happens=happens: next(happens))
        monkeypatch.setattr(
            distortion,
            "convert",
            lambda img, alpha=None, beta=None, calls=calls: calls.append("ca" if alpha else "b") or img,
        )
        monkeypatch.setattr(transforms.F_v1, "adjust_hue", lambda img, factor, calls=calls: calls.append("hue") or img)
        monkeypatch.setattr(
            transforms.F_v1, "adjust_saturation", lambda img, factor, calls=calls: calls.append("saturation") or img
        )
        distortion(noise(2, 2), None)
        orders.add(tuple(calls))
    assert orders == {("b", "ca", "saturation", "hue"), ("b", "saturation", "hue", "ca")}


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_the_label_keeps_its_size_for_sliding_windows(mode: str) -> None:
    images, label = make_segmentation_eval_transforms(img_size=30, inference_mode=mode)(*pair())
    assert [image.shape for image in images] == [(3, 30, 40)]
    assert label.shape == ((1, 30, 40) if mode == "whole" else (1, 48, 64))


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_an_exact_size_is_that_of_image_and_label(mode: str) -> None:
    images, label = make_segmentation_eval_transforms(img_size=[30, 41], inference_mode=mode)(*pair())
    assert images[0].shape == (3, 30, 41) and label.shape == (1, 30, 41)


def test_mirrored_copies_follow_all_sizes() -> None:
    transform = make_segmentation_eval_transforms(img_size=100, use_tta=True, tta_ratios=(0.5, 0.65, 1.0, 1.25))
    images, label = transform(*pair())
    assert [image.shape[1] for image in images] == [64, 96, 100, 125] * 2
    assert all(torch.equal(mirrored, image.flip(-1)) for image, mirrored in zip(images[:4], images[4:], strict=True))
    assert label.shape == (1, 48, 64)


def test_settings_of_an_evaluation_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="inference_mode='sliding': expected one of whole, slide"):
        make_segmentation_eval_transforms(inference_mode="sliding")
    with pytest.raises(ValueError, match=r"use_tta needs one number as img_size.*got \[30, 40\]"):
        make_segmentation_eval_transforms(img_size=[30, 40], use_tta=True)


def test_evaluation_takes_a_label_of_another_size() -> None:
    images, label = make_segmentation_eval_transforms(img_size=24, inference_mode="slide")(pair()[0], pair(96, 128)[1])
    assert images[0].shape == (3, 24, 32) and label.shape == (1, 96, 128)


def test_transforms_can_be_pickled() -> None:
    train = make_segmentation_train_transforms(
        img_size=32, random_img_size_ratio_range=(0.5, 2.0), crop_size=(24, 24), flip_prob=0.5, reduce_zero_label=True
    )
    evaluation = make_segmentation_eval_transforms(img_size=32, use_tta=True, tta_ratios=(0.9, 1.1))
    for transform in (train, evaluation):
        results = []
        for copy in (transform, pickle.loads(pickle.dumps(transform))):
            torch.manual_seed(3)
            results.append(copy(*pair()))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_draws_come_from_torch_alone() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    transform = make_segmentation_train_transforms(img_size=32, random_img_size_ratio_range=(0.5, 2.0), crop_size=24)
    images = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        images.append(transform(*pair())[0])
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert np.array_equal(np.random.get_state()[1], before)
