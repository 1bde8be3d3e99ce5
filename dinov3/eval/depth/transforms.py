"""Transforms of images and their depth maps.

Each takes and returns (image, depth). Images are PIL RGB images. Depths are PIL images with one channel, such as 16-bit
ones in millimetres, or NumPy arrays [H, W]; all become float32 [1, H, W].

Notable:
- Depth is resized and rotated by nearest neighbour: between two depths there is often nothing, and 0 is not a depth but
  stands for "not measured".
- In evaluation only the image is resized. Predictions are compared at the size of the measurement, so the two may
  differ from the start. Training cuts both at one place and refuses that.
- All draws come from torch's generator, which the loader seeds in each worker. Everything can be pickled.
- Images are float32 whatever happens to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from dinov3.eval.dense.transforms import BILINEAR, EqualSizes, ResizeV2, label_to_tensor, plain, size_of
from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

__all__ = [
    "ColorAug",
    "Depth",
    "DepthDivision",
    "FixedCrop",
    "LeftRightFlipAug",
    "NYUCrop",
    "RandomCrop",
    "ResizeV2",
    "ToTensors",
    "make_depth_eval_transforms",
    "make_depth_train_transforms",
]

#: Rows 45..472 and columns 43..608 (half open) of 480 x 640, as shares of height and width.
NYU_ROWS = (45 / 480, 472 / 480)
NYU_COLUMNS = (43 / 640, 608 / 640)


class Depth(tv_tensors.Mask):
    """A depth map [1, H, W] that torchvision's transforms move with its image: by nearest neighbour, filled with 0."""


class FixedCrop:
    """Cut the same part from every image and depth map: for the crop "FULL" all of it."""

    def __call__(self, *inputs: Any) -> Any:
        cut = tuple(self.crop(x) for x in inputs)
        return cut if len(cut) > 1 else cut[0]

    def crop(self, x: Any) -> Any:
        """The part of a PIL image, or of an array or tensor [..., H, W]."""
        return x


class NYUCrop(FixedCrop):
    """Cut the white border of NYU's images: rows 45 to 472 and columns 43 to 608 of 480 x 640, scaled to other sizes.

    Takes and returns any number of PIL images, arrays or tensors.
    """

    def crop(self, x: Any) -> Any:
        height, width = size_of(x)
        top, bottom = (int(share * height) for share in NYU_ROWS)
        left, right = (int(share * width) for share in NYU_COLUMNS)
        if isinstance(x, np.ndarray):
            return x[..., top:bottom, left:right]
        return v2.functional.crop(x, top, left, bottom - top, right - left)


FIXED_CROPS: dict[str, type[FixedCrop]] = {"FULL": FixedCrop, "NYU": NYUCrop}


class ToTensors:
    """A PIL image to float32 [3, H, W] in [0, 1], and a depth map to `Depth` [1, H, W] in its own units."""

    def __call__(self, img: Any, depth: Any) -> tuple[Tensor, Depth]:
        image = v2.functional.to_dtype(v2.functional.pil_to_tensor(img), torch.float32, scale=True)
        return image, Depth(label_to_tensor(depth, "depth map"))


class DepthDivision:
    """Bring depth maps to metres, float32.

    Args:
        constant: units per metre.

    Raises:
        ValueError: it is not positive.
    """

    def __init__(self, constant: float) -> None:
        if not constant > 0:
            raise ValueError(f"normalization_constant is the number of depth units per metre, got {constant}")
        self.constant = constant

    def __call__(self, img: Any, depth: Tensor) -> tuple[Any, Depth]:
        return img, Depth(depth.to(torch.float32) / self.constant)


class RandomCrop:
    """Cut the same random part from both.

    Args:
        size: (height, width).

    Raises:
        ValueError: when called: an image is smaller.
    """

    def __init__(self, size: Sequence[int]) -> None:
        self.height, self.width = (int(side) for side in size)

    def __call__(self, img: Tensor, depth: Tensor) -> tuple[Any, Any]:
        height, width = size_of(img)
        if height < self.height or width < self.width:
            raise ValueError(
                f"an image of {height} x {width} (height x width) is smaller than random_crop={self.height} x "
                f"{self.width}: choose a smaller crop, or a larger img_size"
            )
        top = int(torch.randint(height - self.height + 1, ()))
        left = int(torch.randint(width - self.width + 1, ()))
        img, depth = (v2.functional.crop(x, top, left, self.height, self.width) for x in (img, depth))
        return img, depth


class ColorAug(v2.Transform):
    """Change gamma, brightness and the weights of the colours of an image; depth stays.

    The power acts on values in [0, 255], so that gamma changes the brightness too: published heads were trained so.

    Args:
        prob: probability that an image is changed, in [0, 1].
        gamma_range: of the exponent.
        brightness_range: of the factor of all channels.
        color_range: of the factor of each channel.

    Raises:
        ValueError: `prob` is out of range.
    """

    def __init__(
        self,
        prob: float = 0.5,
        gamma_range: Sequence[float] = (0.9, 1.1),
        brightness_range: Sequence[float] = (0.9, 1.1),
        color_range: Sequence[float] = (0.9, 1.1),
    ) -> None:
        super().__init__()
        if not 0 <= prob <= 1:
            raise ValueError(f"prob is the probability of a change and lies in [0, 1], got {prob}")
        self.prob = prob
        self.gamma_range = tuple(gamma_range)
        self.brightness_range = tuple(brightness_range)
        self.color_range = tuple(color_range)

    def forward(self, *inputs: Any) -> Any:
        """Images float32 [3, H, W] in [0, 1], and depths or nothing, to the same."""
        if torch.rand(()) >= self.prob:
            return inputs if len(inputs) > 1 else inputs[0]
        return super().forward(*inputs)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The exponent, the factor, and that of each channel."""
        gamma, brightness = _uniform(self.gamma_range, ()), _uniform(self.brightness_range, ())
        return {"gamma": gamma, "brightness": brightness, "color": _uniform(self.color_range, (3, 1, 1))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """One image changed; a mask as it is."""
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        changed = (255 * inpt).pow(params["gamma"]) * params["brightness"] * params["color"]
        return changed.clamp(0, 255) / 255


class LeftRightFlipAug:
    """Lists of what a model sees of one image: the image, and with `flip` its mirror image too.

    Args:
        flip: add the mirror image.
    """

    def __init__(self, flip: bool) -> None:
        self.flip = flip

    def __call__(self, img: Tensor, depth: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        img, depth = plain(img), plain(depth)
        if not self.flip:
            return [img], [depth]
        return [img, img.flip(-1)], [depth, depth.flip(-1)]

    def inverse(self, x: Tensor) -> Tensor:
        """One prediction of each image.

        Args:
            x: predictions [2 B, C, H, W], those of the mirror images in the second half; without `flip` [B, C, H, W].

        Returns:
            [B, C, H, W]: with `flip` the mean of both, the second flipped back.

        Raises:
            ValueError: with `flip`, an odd number of predictions.
        """
        if not self.flip:
            return x
        if len(x) % 2:
            raise ValueError(f"with the flip, predictions come in pairs, got {len(x)}")
        straight, mirrored = x.chunk(2)
        return (straight + mirrored.flip(-1)) / 2


def make_depth_train_transforms(
    *,
    normalization_constant: float = 1.0,
    rotation_angle: float = 2.5,
    interpolation: v2.InterpolationMode = BILINEAR,
    img_size: int | Sequence[int] | None = None,
    random_crop_size: Sequence[int] | None = (352, 704),
    fixed_crop: str = "FULL",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    brightness_range: Sequence[float] = (0.9, 1.1),
) -> v2.Compose:
    """Training pairs: cut, resized, rotated, flipped, cut at random, recoloured, normalised.

    Args:
        normalization_constant: depth units per metre.
        rotation_angle: half of the pairs are rotated by up to this many degrees.
        interpolation: of the image.
        img_size: (height, width), or the shorter side; None: no resize.
        random_crop_size: (height, width); None: no crop, then all images must end with one size.
        fixed_crop: "FULL" or "NYU", first of all.
        mean: per channel, of values in [0, 1].
        std: per channel.
        brightness_range: of `ColorAug`, which changes half of the images.

    Returns:
        A transform of (image, depth) to float32 tensors [3, H, W] and [1, H, W] in metres.

    Raises:
        ValueError: a setting is out of range. When called: image and depth differ in size, or are smaller than the
            crop.
    """
    rotate = v2.RandomRotation(rotation_angle, interpolation=BILINEAR)
    return v2.Compose(
        [
            EqualSizes("depth map"),
            _make_fixed_crop(fixed_crop),
            *([ResizeV2(img_size, image_interpolation=interpolation)] if img_size else []),
            ToTensors(),
            DepthDivision(normalization_constant),
            *([v2.RandomApply([rotate], p=0.5)] if rotation_angle else []),
            v2.RandomHorizontalFlip(0.5),
            *([RandomCrop(random_crop_size)] if random_crop_size else []),
            ColorAug(0.5, brightness_range=brightness_range),
            _Normalize(mean, std),
        ]
    )


def make_depth_eval_transforms(
    *,
    normalization_constant: float = 1.0,
    img_size: int | Sequence[int] | None = None,
    image_interpolation: v2.InterpolationMode = BILINEAR,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    fixed_crop: str = "FULL",
    tta: bool = False,
) -> v2.Compose:
    """Evaluation pairs: nothing is random, and depth keeps its size.

    Args:
        normalization_constant: depth units per metre.
        img_size: (height, width) of the image, or its shorter side; None: no resize.
        image_interpolation: of that resize, which is one of floating-point tensors with antialiasing.
        mean: per channel, of values in [0, 1].
        std: per channel.
        fixed_crop: "FULL" or "NYU", of both.
        tta: add the mirror images.

    Returns:
        A transform of (image, depth) to lists of float32 tensors [3, H, W] and [1, h, w] in metres.

    Raises:
        ValueError: a setting is out of range.
    """
    return v2.Compose(
        [
            _make_fixed_crop(fixed_crop),
            ToTensors(),
            *([ResizeV2(img_size, image_interpolation, resize_label=False)] if img_size else []),
            _Normalize(mean, std),
            DepthDivision(normalization_constant),
            LeftRightFlipAug(tta),
        ]
    )


class _Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = list(mean)
        self.std = list(std)

    def __call__(self, img: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        return v2.functional.normalize(img, self.mean, self.std), plain(depth)


def _make_fixed_crop(name: str) -> FixedCrop:
    if name not in FIXED_CROPS:
        raise ValueError(f"there is no fixed crop {name!r}; expected one of {', '.join(FIXED_CROPS)}")
    return FIXED_CROPS[name]()


def _uniform(bounds: Sequence[float], shape: tuple[int, ...]) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, dtype=torch.float32)
