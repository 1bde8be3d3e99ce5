"""Transforms of images and depth maps: kinds of depth maps, what moves together, what stays float32."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from dinov3.eval.depth.transforms import (
    ColorAug,
    Depth,
    LeftRightFlipAug,
    NYUCrop,
    ResizeV2,
    ToTensors,
    make_depth_eval_transforms,
    make_depth_train_transforms,
)


def numbered(height: int, width: int) -> np.ndarray:
    """A map where every pixel has another depth, none 0."""
    return 1 + np.arange(height * width, dtype=np.uint16).reshape(height, width)


def image_of(depth: np.ndarray) -> Image.Image:
    """An image whose red and green values give the depth of each pixel away."""
    red, green = depth // 256, depth % 256
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], axis=-1).astype(np.uint8))


def seen_depth(image: Tensor, mean: Any = (0.0,) * 3) -> Tensor:
    """The depths that an image of `image_of`, in [0, 1], gives away."""
    red, green, _ = (255 * image).round()
    return 256 * red + green


FORMS = {
    "16-bit PIL": lambda depth: Image.fromarray(depth),
    "16-bit PIL, big endian": lambda depth: Image.frombytes("I;16B", depth.shape[::-1], depth.astype(">u2").tobytes()),
    "32-bit PIL": lambda depth: Image.fromarray(depth.astype(np.int32)),
    "float PIL": lambda depth: Image.fromarray(depth.astype(np.float32)),
    "uint16 array": lambda depth: depth,
    "float32 array": lambda depth: depth.astype(np.float32),
    "float64 array": lambda depth: depth.astype(np.float64),
    "tensor": lambda depth: torch.from_numpy(depth.astype(np.float32)),
    "tensor with a channel": lambda depth: torch.from_numpy(depth.astype(np.float32))[None],
}


@pytest.mark.parametrize("form", FORMS)
def test_depth_comes_in_many_kinds(form: str) -> None:
    depth = numbered(20, 30)
    _, depths = make_depth_eval_transforms(normalization_constant=1000.0)(image_of(depth), FORMS[form](depth))
    assert depths[0].dtype == torch.float32
    torch.testing.assert_close(depths[0][0], torch.from_numpy(depth.astype(np.float32) / 1000), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_kinds_of_depth_are_trained_on_alike(form: str) -> None:
    depth = numbered(48, 64)
    transform = make_depth_train_transforms(fixed_crop="NYU", random_crop_size=(30, 40))
    results = []
    for kind in (FORMS[form], FORMS["16-bit PIL"]):
        torch.manual_seed(5)
        results.append(transform(image_of(depth), kind(depth)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert {type(x) for x in results[0]} == {Tensor}


def test_a_16_bit_image_stays_exact() -> None:
    _, depth = ToTensors(1)(image_of(numbered(4, 5)), Image.fromarray(np.full((4, 5), 65535, dtype=np.uint16)))
    assert depth.dtype == torch.float32 and depth.shape == (1, 4, 5)
    assert set(depth.long().flatten().tolist()) == {65535}


def test_depth_with_several_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="depth map has one channel.*'RGB'"):
        ToTensors(1)(Image.new("RGB", (5, 4)), Image.new("RGB", (5, 4)))
    with pytest.raises(ValueError, match=r"depth map has shape.*\(4, 5, 3\)"):
        ToTensors(1)(Image.new("RGB", (5, 4)), np.zeros((4, 5, 3)))
    with pytest.raises(TypeError, match="got list"):
        ToTensors(1)(Image.new("RGB", (5, 4)), [[1.0]])


def test_transforms_leave_the_datasets_array_alone() -> None:
    depth = numbered(20, 30).astype(np.float32)
    before = depth.copy()
    _, depths = make_depth_eval_transforms(normalization_constant=2.0)(image_of(numbered(20, 30)), depth)
    depths[0].zero_()
    assert np.array_equal(depth, before)


@pytest.mark.parametrize("constant", [1.0, 1000.0])
def test_training_pairs_are_float32_whatever_happens_to_them(constant: float) -> None:
    transform = make_depth_train_transforms(normalization_constant=constant, random_crop_size=(20, 30))
    depth = numbered(48, 64)
    for seed in range(20):
        torch.manual_seed(seed)
        image, target = transform(image_of(depth), Image.fromarray(depth))
        assert (image.dtype, target.dtype) == (torch.float32, torch.float32)
        assert (image.shape, target.shape) == ((3, 20, 30), (1, 20, 30))


def test_image_and_depth_move_together() -> None:
    transform = make_depth_train_transforms(
        rotation_angle=0.0, random_crop_size=(20, 30), mean=(0, 0, 0), std=(1, 1, 1), brightness_range=(1, 1)
    )
    steps = [step for step in transform.transforms if not isinstance(step, ColorAug)]
    depth = numbered(48, 64)
    corners, orders = set(), set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = v2.Compose(steps)(image_of(depth), Image.fromarray(depth))
        assert torch.equal(seen_depth(image), target[0])
        corners.add(float(target[0].min()))
        orders.add(bool(target[0, 0, 0] < target[0, 0, 1]))
    assert len(corners) > 6 and orders == {True, False}


def test_rotated_depths_are_depths_that_were_there() -> None:
    depth = numbered(48, 64)
    transform = make_depth_train_transforms(rotation_angle=45.0, random_crop_size=None)
    rotated = 0
    for seed in range(12):
        torch.manual_seed(seed)
        target = transform(image_of(depth), Image.fromarray(depth))[1]
        assert torch.equal(target, target.round())
        rotated += bool((target == 0).any())
    assert 2 <= rotated <= 10


def test_pairs_are_rotated_by_at_most_the_angle() -> None:
    # Depth is the number of the row, so that a row of the result climbs by the angle.
    depth = np.arange(1, 102, dtype=np.uint16)[:, None].repeat(101, axis=1)
    transform = make_depth_train_transforms(rotation_angle=5.0, random_crop_size=None)
    slopes = []
    for seed in range(120):
        torch.manual_seed(seed)
        row = transform(image_of(depth), Image.fromarray(depth))[1][0, 50]
        slopes.append(float(row[90] - row[10]) / 80)
    angles = np.degrees(np.arctan(slopes))
    assert -6 < angles.min() < -3 and 3 < angles.max() < 6
    assert 40 <= np.count_nonzero(angles == 0) <= 80


def test_no_random_crop_is_no_crop() -> None:
    depth = numbered(48, 64)
    image, target = make_depth_train_transforms(random_crop_size=None)(image_of(depth), Image.fromarray(depth))
    assert image.shape == (3, 48, 64) and target.shape == (1, 48, 64)


def test_an_image_smaller_than_the_crop_is_named() -> None:
    transform = make_depth_train_transforms(random_crop_size=(60, 40))
    with pytest.raises(ValueError, match="48 x 64.*smaller than random_crop=60 x 40"):
        transform(image_of(numbered(48, 64)), Image.fromarray(numbered(48, 64)))


def test_training_refuses_a_depth_map_of_another_size() -> None:
    transform = make_depth_train_transforms(random_crop_size=None)
    for other in (Image.fromarray(numbered(24, 32)), numbered(24, 32)):
        with pytest.raises(ValueError, match="image is 48 x 64 .* depth map 24 x 32"):
            transform(image_of(numbered(48, 64)), other)


def test_evaluation_keeps_the_size_of_the_measurement() -> None:
    images, depths = make_depth_eval_transforms(img_size=16)(image_of(numbered(48, 64)), numbered(30, 40))
    assert images[0].shape == (3, 16, 21)
    assert depths[0].shape == (1, 30, 40)


def test_evaluation_resizes_with_antialiasing() -> None:
    stripes = np.zeros((32, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    transform = make_depth_eval_transforms(img_size=8, mean=(0, 0, 0), std=(1, 1, 1))
    images, _ = transform(Image.fromarray(stripes), numbered(32, 64))
    torch.testing.assert_close(images[0], torch.full((3, 8, 16), 0.5), atol=0.05, rtol=0)


def test_test_time_flips_come_in_lists() -> None:
    depth = numbered(20, 30)
    images, depths = make_depth_eval_transforms(tta=True)(image_of(depth), Image.fromarray(depth))
    assert torch.equal(images[1], images[0].flip(-1)) and torch.equal(depths[1], depths[0].flip(-1))
    assert {type(x) for x in (*images, *depths)} == {Tensor}


def test_flips_are_undone() -> None:
    x = torch.arange(12.0).view(2, 1, 2, 3)
    flip = LeftRightFlipAug(True)
    assert torch.equal(flip.inverse(torch.cat([x, x.flip(-1)])), x)
    assert LeftRightFlipAug(False).inverse(x) is x
    with pytest.raises(ValueError, match="come in pairs, got 3"):
        flip.inverse(x[[0, 1, 1]])


def test_nyu_crop_of_everything() -> None:
    depth = numbered(480, 640)
    want = depth[45:472, 43:608]
    image, array = NYUCrop()(image_of(depth), depth)
    assert np.array_equal(np.asarray(image), np.asarray(image_of(want))) and np.array_equal(array, want)
    tensor = NYUCrop()(Depth(torch.from_numpy(depth.astype(np.int32))[None]))
    assert type(tensor) is Depth and np.array_equal(tensor[0].numpy(), want)
    with pytest.raises(ValueError, match="'NYU_EIGEN': expected one of FULL, NYU"):
        make_depth_eval_transforms(fixed_crop="NYU_EIGEN")


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_v2_resizes_depth_by_nearest_neighbour(dtype: torch.dtype) -> None:
    depth = Depth(torch.from_numpy(numbered(20, 30).astype(np.float32))[None].to(dtype))
    for resize in (
        v2.Resize((10, 15)),
        v2.Resize((10, 15), antialias=True, interpolation=v2.InterpolationMode.BICUBIC),
    ):
        resized = resize(depth)
        assert type(resized) is Depth and resized.dtype == dtype
        assert set(resized.long().flatten().tolist()) <= set(depth.long().flatten().tolist())


def test_arrays_are_resized_as_pil_images_are() -> None:
    depth = numbered(48, 64)
    _, pil = ResizeV2(17)(image_of(depth), Image.fromarray(depth))
    _, array = ResizeV2(17)(image_of(depth), depth)
    assert np.array_equal(np.asarray(pil), array)


def test_colours_change_within_their_ranges() -> None:
    image = torch.full((3, 4, 5), 0.5)
    change = ColorAug(1.0, gamma_range=(1, 1), brightness_range=(0.8, 0.9), color_range=(0.95, 1.0))
    seen = []
    for seed in range(30):
        torch.manual_seed(seed)
        changed = change(image)
        assert changed.dtype == torch.float32 and (changed == changed[:, :1, :1]).all()
        seen.append(changed[:, 0, 0] / 0.5)
    factors = torch.stack(seen)
    assert factors.min() > 0.8 * 0.95 and factors.max() < 0.9
    assert (factors[:, 0] != factors[:, 1]).any()


def test_gamma_acts_on_values_up_to_255_and_the_result_is_clipped() -> None:
    image = torch.full((3, 2, 2), 0.5)
    change = ColorAug(1.0, gamma_range=(1.1, 1.1), brightness_range=(1, 1), color_range=(1, 1))
    assert change(image).max().item() == pytest.approx(127.5**1.1 / 255, rel=1e-5)
    assert change(torch.ones(3, 2, 2)).max().item() == 1.0


def test_colours_change_with_the_given_probability_and_depth_never() -> None:
    image, depth = torch.full((3, 2, 2), 0.5), Depth(torch.ones(1, 2, 2))
    torch.manual_seed(0)
    changed = 0
    for _ in range(400):
        result, same = ColorAug()(image, depth)
        assert same is depth
        changed += not torch.equal(result, image)
    assert 160 < changed < 240
    assert ColorAug(0.0)(image) is image
    with pytest.raises(ValueError, match="prob is the probability.*got 2"):
        ColorAug(2)


def test_a_constant_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="depth units per metre, got 0"):
        make_depth_eval_transforms(normalization_constant=0)


@pytest.mark.parametrize("fixed_crop", ["FULL", "NYU"])
def test_transforms_can_be_pickled(fixed_crop: str) -> None:
    depth = numbered(48, 64)
    train = make_depth_train_transforms(img_size=24, random_crop_size=(12, 16), fixed_crop=fixed_crop)
    evaluation = make_depth_eval_transforms(img_size=24, fixed_crop=fixed_crop, tta=True)
    for transform in (train, evaluation):
        results = []
        for copy in (transform, pickle.loads(pickle.dumps(transform))):
            torch.manual_seed(3)
            results.append(copy(image_of(depth), Image.fromarray(depth)))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(image_of(numbered(48, 64)), numbered(48, 64).astype(np.float32))


def test_workers_draw_from_the_seed_of_their_loader() -> None:
    transform = make_depth_train_transforms(random_crop_size=(12, 16))
    batches = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(Pairs(transform), batch_size=4, num_workers=2, generator=generator)
        batches.append([torch.cat([image, depth], dim=1) for image, depth in loader])
    assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[1], strict=True))
    assert not torch.equal(batches[0][0], batches[2][0])
    assert not torch.equal(batches[0][0][0], batches[0][0][1])


def test_draws_do_not_touch_other_generators() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    torch.manual_seed(0)
    make_depth_train_transforms(random_crop_size=(12, 16))(image_of(numbered(48, 64)), numbered(48, 64))
    assert np.array_equal(np.random.get_state()[1], before)
