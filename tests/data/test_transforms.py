from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.data.transforms import (
    SAT_DEFAULT_MEAN,
    SAT_DEFAULT_STD,
    get_target_transform,
    imaterialist_classification_target_transform,
    make_base_transform,
    make_classification_eval_transform,
    make_classification_train_transform,
    make_eval_transform,
    voc2007_classification_target_transform,
)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("flags", "size"),
    [({}, (20, 40)), ({"resize_square": True}, (20, 20)), ({"resize_large_side": True}, (10, 20))],
    ids=["shorter side", "square", "larger side"],
)
def test_resize_gives_the_chosen_side_its_length(flags: dict[str, bool], size: tuple[int, int]) -> None:
    resized = make_eval_transform(resize_size=20, crop_size=0, **flags)(noise(50, 100))
    assert tuple(resized.shape[1:]) == size


def test_resize_enlarges_too() -> None:
    transform = make_eval_transform(resize_size=30, crop_size=0, resize_large_side=True)
    assert tuple(transform(noise(5, 10)).shape[1:]) == (15, 30)


def test_resize_refuses_both_flags() -> None:
    with pytest.raises(ValueError, match="resize_square and resize_large_side exclude each other"):
        make_eval_transform(resize_square=True, resize_large_side=True)


@pytest.mark.parametrize("crop_size", [0, None])
def test_eval_transform_without_crop_keeps_the_resized_image(crop_size: int | None) -> None:
    assert make_eval_transform(resize_size=16, crop_size=crop_size)(noise(32, 64)).shape == (3, 16, 32)


def test_eval_transform_pads_with_black_before_normalising() -> None:
    image = make_classification_eval_transform(resize_size=4, crop_size=8)(Image.new("RGB", (4, 4), (255, 255, 255)))
    black = make_base_transform()(torch.zeros(3, 1, 1, dtype=torch.uint8))
    assert torch.equal(image[:, :1, :1], black)
    assert (image[:, 2:6, 2:6] > 2).all()


def test_eval_transform_uses_the_given_statistics() -> None:
    gray = Image.new("RGB", (8, 8), (51, 51, 51))
    image = make_eval_transform(resize_size=8, crop_size=8, mean=SAT_DEFAULT_MEAN, std=SAT_DEFAULT_STD)(gray)
    want = (0.2 - torch.tensor(SAT_DEFAULT_MEAN)) / torch.tensor(SAT_DEFAULT_STD)
    assert torch.allclose(image[:, 0, 0], want)


def test_train_transform_crops_at_random_and_flips_with_the_given_probability() -> None:
    torch.manual_seed(0)
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3)))

    def flipped(hflip_prob: float) -> list[bool]:
        transform = make_classification_train_transform(crop_size=16, hflip_prob=hflip_prob)
        images = [transform(ramp) for _ in range(30)]
        assert all(image.shape == (3, 16, 16) and image.dtype == torch.float32 for image in images)
        assert len({image.mean().item() for image in images}) > 10
        return [bool(image[0, 0, 0] > image[0, 0, -1]) for image in images]

    assert not any(flipped(0.0))
    assert all(flipped(1.0))
    assert len(set(flipped(0.5))) == 2


def test_transforms_can_be_pickled() -> None:
    image = noise(20, 30)
    for make in (make_classification_eval_transform, make_classification_train_transform):
        transform = make(crop_size=8)
        torch.manual_seed(0)
        want = transform(image)
        torch.manual_seed(0)
        assert torch.equal(pickle.loads(pickle.dumps(transform))(image), want)


def test_voc2007_target_is_one_where_a_class_is_present() -> None:
    label = SimpleNamespace(instances=[SimpleNamespace(category_id=i) for i in (3, 19, 3)])
    target = voc2007_classification_target_transform(label)
    assert (target.shape, target.dtype, target.nonzero().flatten().tolist()) == ((20,), torch.int64, [3, 19])


def test_imaterialist_target_is_one_where_an_attribute_is_present() -> None:
    target = imaterialist_classification_target_transform(SimpleNamespace(attributes=[0, 293]))
    assert (target.shape, target.nonzero().flatten().tolist()) == ((294,), [0, 293])
    assert imaterialist_classification_target_transform(SimpleNamespace(attributes=[])).sum() == 0


@pytest.mark.parametrize(
    ("dataset_str", "transform"),
    [
        ("VOC2007:split=TRAIN", voc2007_classification_target_transform),
        ("IMaterialist:split=VAL", imaterialist_classification_target_transform),
        ("ImageNet:split=TRAIN", None),
        ("ImageFolder:root=/data/VOC2007", None),
    ],
)
def test_target_transform_by_dataset(dataset_str: str, transform: Any) -> None:
    assert get_target_transform(dataset_str) is transform


@pytest.mark.parametrize("make", [make_classification_eval_transform, make_classification_train_transform])
def test_pictures_of_every_mode(make: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)
    wants = []
    for picture in (
        Image.fromarray(pixels).convert("RGB"),
        Image.fromarray(pixels.astype(np.uint16) * 257),
        Image.fromarray(pixels),
    ):
        torch.manual_seed(0)
        wants.append(make(crop_size=16)(picture))
    assert torch.equal(wants[0], wants[1]) and torch.equal(wants[0], wants[2])
