"""Transforms of images and their depth maps.

Each takes and returns (image, depth). Images are PIL RGB images. Depths are PIL images with one channel, such as 16-bit
ones in millimetres, or NumPy arrays [H, W]; all become float32 [1, H, W]. All draws come from torch's generator, which
the loader seeds in each worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from dinov3.eval.dense.transforms import (
    BILINEAR,
    EqualSizes,
    NormalizeImage,
    ResizeV2,
    as_plain_tensor,
    label_to_tensor,
    size_of,
)
from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

#: Rows 45..472 and columns 43..608 (half open) of 480 x 640, as shares of height and width.
NYU_ROWS = (45 / 480, 472 / 480)
NYU_COLUMNS = (43 / 640, 608 / 640)


class Depth(tv_tensors.Mask):
    """A depth map [1, H, W] that torchvision's transforms move with its image: by nearest neighbour, filled with 0.

    Between two depths there is often nothing, and 0 is not a depth but means "not measured".
    """


class NYUCrop:
    """Cut the white border of NYU's images: rows 45 to 472 and columns 43 to 608 of 480 x 640, scaled to other sizes.

    Takes and returns any number of PIL images, or of arrays or tensors [..., H, W].
    """

    def __call__(self, *inputs: Any) -> Any:
        cut = tuple(self._crop(x) for x in inputs)
        return cut if len(cut) > 1 else cut[0]

    def _crop(self, x: Any) -> Any:
        height, width = size_of(x)
        top, bottom = (int(share * height) for share in NYU_ROWS)
        left, right = (int(share * width) for share in NYU_COLUMNS)
        if isinstance(x, np.ndarray):
            return x[..., top:bottom, left:right]
        return v2.functional.crop(x, top, left, bottom - top, right - left)


#: What is cut from all images and depth maps, by the name of the crop.
FIXED_CROPS: dict[str, list[Any]] = {"FULL": [], "NYU": [NYUCrop()]}


class ToTensors:
    """Convert a PIL image to float32 [3, H, W] in [0, 1], and a depth map to float32 `Depth` [1, H, W] in metres.

    Args:
        units_per_metre: of the stored depths.

    Raises:
        ValueError: `units_per_metre` is not positive.
    """

    def __init__(self, units_per_metre: float) -> None:
        if not units_per_metre > 0:
            raise ValueError(f"normalization_constant is the number of depth units per metre, got {units_per_metre}")
        self.units_per_metre = units_per_metre

    def __call__(self, img: Any, depth: Any) -> tuple[Tensor, Depth]:
        image = v2.functional.to_dtype(v2.functional.pil_to_tensor(img), torch.float32, scale=True)
        return image, Depth(label_to_tensor(depth, "depth map").to(torch.float32) / self.units_per_metre)


class RandomCrop:
    """Cut the same random part from both.

    Args:
        size: (height, width).

    Raises:
        ValueError: when called: the image is smaller.
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


class ColorAug:
    """Change gamma, brightness and the weights of the colours of an image; depth stays.

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
        if not 0 <= prob <= 1:
            raise ValueError(f"prob is the probability of a change and lies in [0, 1], got {prob}")
        self.prob = prob
        self.gamma_range = tuple(gamma_range)
        self.brightness_range = tuple(brightness_range)
        self.color_range = tuple(color_range)

    def __call__(self, img: Tensor, *depth: Any) -> Any:
        """Change an image float32 [3, H, W] in [0, 1], and hand on the depth if there is one."""
        if torch.rand(()) < self.prob:
            gamma, brightness = _uniform(self.gamma_range, ()), _uniform(self.brightness_range, ())
            # The power acts on values in [0, 255], so that gamma changes the brightness too: published heads were
            # trained that way.
            img = (255 * img).pow(gamma) * brightness * _uniform(self.color_range, (3, 1, 1))
            img = img.clamp(0, 255) / 255
        return (img, *depth) if depth else img


class LeftRightFlipAug:
    """Make lists of what a model sees of one image: the image, and with `flip` the flipped image too.

    Args:
        flip: add the flipped image.
    """

    def __init__(self, flip: bool) -> None:
        self.flip = flip

    def __call__(self, img: Tensor, depth: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        img, depth = as_plain_tensor(img), as_plain_tensor(depth)
        if not self.flip:
            return [img], [depth]
        return [img, img.flip(-1)], [depth, depth.flip(-1)]

    def inverse(self, x: Tensor) -> Tensor:
        """Combine the predictions of each image.

        Args:
            x: predictions [2 B, C, H, W], those of flipped images in the second half; without `flip` [B, C, H, W].

        Returns:
            [B, C, H, W]: with `flip` the mean of both, the second one flipped back.

        Raises:
            ValueError: with `flip`, the number of predictions is odd.
        """
        if not self.flip:
            return x
        if len(x) % 2:
            raise ValueError(f"with flips, predictions come in pairs, got {len(x)}")
        straight, flipped = x.chunk(2)
        return (straight + flipped.flip(-1)) / 2


def make_depth_train_transforms(
    *,
    normalization_constant: float = 1.0,
    rotation_angle: float = 2.5,
    img_size: int | Sequence[int] | None = None,
    random_crop_size: Sequence[int] | None = (352, 704),
    fixed_crop: str = "FULL",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    brightness_range: Sequence[float] = (0.9, 1.1),
) -> v2.Compose:
    """Make the transforms of training pairs: cut, resize, rotate, flip, crop at random, recolour, normalise.

    Args:
        normalization_constant: depth units per metre.
        rotation_angle: half of the pairs are rotated by up to this many degrees.
        img_size: (height, width), or the shorter side. Default: no resize.
        random_crop_size: (height, width). None: no crop, so all images must have one size in the end.
        fixed_crop: "FULL" or "NYU", cut first.
        mean: per channel, of values in [0, 1].
        std: per channel.
        brightness_range: of `ColorAug`, which changes half of the images.

    Returns:
        A transform of (image, depth) to float32 tensors [3, H, W] and [1, H, W] in metres.

    Raises:
        ValueError: a setting is out of range. When called: image and depth differ in size, or are smaller than the
            crop.
    """
    rotate = v2.RandomApply([v2.RandomRotation(rotation_angle, interpolation=BILINEAR)], p=0.5)
    return v2.Compose(
        [
            EqualSizes("depth map"),
            *_find_fixed_crop(fixed_crop),
            *([ResizeV2(img_size)] if img_size else []),
            ToTensors(normalization_constant),
            *([rotate] if rotation_angle else []),
            v2.RandomHorizontalFlip(0.5),
            *([RandomCrop(random_crop_size)] if random_crop_size else []),
            ColorAug(0.5, brightness_range=brightness_range),
            NormalizeImage(mean, std),
        ]
    )


def make_depth_eval_transforms(
    *,
    normalization_constant: float = 1.0,
    img_size: int | Sequence[int] | None = None,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    fixed_crop: str = "FULL",
    tta: bool = False,
) -> v2.Compose:
    """Make the transforms of evaluation pairs, in which nothing is random.

    Only the image is resized: predictions are compared at the size of the measurement, which may differ from the start.

    Args:
        normalization_constant: depth units per metre.
        img_size: (height, width) of the image, or its shorter side. Default: no resize.
        mean: per channel, of values in [0, 1].
        std: per channel.
        fixed_crop: "FULL" or "NYU", cut from both.
        tta: add the flipped images.

    Returns:
        A transform of (image, depth) to lists of float32 tensors [3, H, W] and [1, h, w] in metres.

    Raises:
        ValueError: a setting is out of range.
    """
    return v2.Compose(
        [
            *_find_fixed_crop(fixed_crop),
            ToTensors(normalization_constant),
            *([ResizeV2(img_size, resize_label=False)] if img_size else []),
            NormalizeImage(mean, std),
            LeftRightFlipAug(tta),
        ]
    )


def _find_fixed_crop(name: str) -> list[Any]:
    if name not in FIXED_CROPS:
        raise ValueError(f"unknown fixed crop {name!r}: expected one of {', '.join(FIXED_CROPS)}")
    return FIXED_CROPS[name]


def _uniform(bounds: Sequence[float], shape: tuple[int, ...]) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, dtype=torch.float32)
