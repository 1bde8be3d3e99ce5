"""Which normalisation belongs to which weights, and what pictures are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.data.transforms import IMAGENET_DEFAULT_MEAN, SAT_DEFAULT_MEAN
from dinov3.hub.backbones import Weights, url_of
from dinov3.hub.transforms import make_transform, normalization_of


@pytest.mark.parametrize(
    ("weights", "mean"),
    [
        (Weights.LVD1689M, IMAGENET_DEFAULT_MEAN),
        (Weights.SAT493M, SAT_DEFAULT_MEAN),
        ("sat493m", SAT_DEFAULT_MEAN),
        ("LVD1689M", IMAGENET_DEFAULT_MEAN),
        (url_of("dinov3_vitl16", Weights.SAT493M) + "?Signature=lvd1689m", SAT_DEFAULT_MEAN),
        (Path("/data/sat493m/dinov3_vits16_pretrain_lvd1689m-08c60483.pth"), IMAGENET_DEFAULT_MEAN),
        ("models--facebook--dinov3-vitl16-pretrain-sat493m/", SAT_DEFAULT_MEAN),
    ],
)
def test_normalization_belongs_to_the_data(weights: Any, mean: tuple[float, ...]) -> None:
    assert normalization_of(weights).mean == mean


@pytest.mark.parametrize("weights", ["w.pth", "lvd1689m-and-sat493m.pth", "/sat493m/w.pth", "unsat493m.pth"])
def test_weights_that_do_not_say_what_they_were_trained_on(weights: str) -> None:
    with pytest.raises(ValueError, match=r"does not say .*: give Weights.LVD1689M or Weights.SAT493M"):
        normalization_of(weights)


def test_pictures_of_every_kind_give_the_same() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    picture, tensor = Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)
    for order in ("resize_uint8_then_float", "float_then_resize"):
        transform = make_transform((32, 48), order=order)
        want = transform(picture)
        assert type(want) is torch.Tensor and want.shape == (3, 32, 48) and want.dtype == torch.float32
        for other in (pixels, tensor, picture.convert("RGBA")):
            assert torch.equal(transform(other), want)
        assert torch.equal(transform(torch.stack([tensor, tensor]))[1], want)
        grey = picture.convert("L")
        assert torch.equal(transform(grey), transform(grey.convert("RGB")))
        torch.testing.assert_close(
            transform(tensor / 255), want, rtol=0, atol=0.03 if order.startswith("resize") else 1e-5
        )


def test_default_size_and_order() -> None:
    picture = Image.new("RGB", (50, 40))
    assert torch.equal(
        make_transform()(picture), make_transform(256, weights="LVD1689M", order="resize_uint8_then_float")(picture)
    )


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"order='float_than_resize' \(did you mean 'float_then_resize'\?\)"):
        make_transform(order="float_than_resize")
    for size in (0, (224,), (224, 0), (1.5, 2), (1, 2, 3)):
        with pytest.raises(ValueError, match="resize_size must be a positive number of pixels, or height and width"):
            make_transform(size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a picture of 3 channels .*, got 1"):
        make_transform()(torch.zeros(1, 8, 8))


def test_pictures_of_more_than_8_bits_are_scaled() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)
    transform = make_transform((32, 48))
    want = transform(Image.fromarray(pixels).convert("RGB"))
    deep = pixels.astype(np.uint16) * 257
    for same in (deep, pixels.astype(np.float32) / 255):
        assert torch.equal(transform(Image.fromarray(same)), want)
    rgb = np.stack([deep] * 3, axis=-1)
    torch.testing.assert_close(transform(rgb), want, rtol=0, atol=0.03)  # no rounding after the resize


def test_transparent_and_lying_pictures_are_as_they_are_seen() -> None:
    transform = make_transform((16, 16))
    assert torch.equal(transform(Image.new("RGBA", (9, 9))), transform(Image.new("RGB", (9, 9), "white")))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    lying = Image.fromarray(pixels)
    lying.getexif()[0x0112] = 6
    assert torch.equal(transform(lying), transform(np.rot90(pixels, -1).copy()))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (torch.full((3, 8, 8), 128.0), r"floats has values from 0 \(black\) to 1 \(white\), got 128 to 128: divide it"),
        (torch.full((3, 8, 8), float("nan")), "got nan to nan"),
        (torch.full((3, 8, 8), 128), "uint8, uint16, or floats from 0 to 1, got torch.int64"),
        (Image.fromarray(np.full((8, 8), 300, np.float32)), "floating-point numbers from 300 to 300"),
    ],
    ids=["bytes as floats", "NaN", "integers", "mode F"],
)
def test_pictures_whose_brightness_is_unknown_are_refused(picture: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_transform()(picture)
