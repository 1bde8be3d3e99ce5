"""Image transforms of the evaluations: to tensor, resize, crop, normalise.

Notable:
- Images are resized as uint8 tensors, with antialiasing. Published evaluation numbers were taken this way; a resize of
  floats or by Pillow gives other pixels.
- `SAT_DEFAULT_MEAN` and `SAT_DEFAULT_STD` belong to the models that were pretrained on satellite images.
- `GaussianBlur(p=...)` blurs with probability p. The official release's class blurs with probability 1 - p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_MEAN as IMAGENET_DEFAULT_MEAN
from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_STD as IMAGENET_DEFAULT_STD
from dinov3.utils.pixel_statistics import SAT_DEFAULT_MEAN as SAT_DEFAULT_MEAN
from dinov3.utils.pixel_statistics import SAT_DEFAULT_STD as SAT_DEFAULT_STD

CROP_DEFAULT_SIZE = 224
RESIZE_DEFAULT_SIZE = int(256 * CROP_DEFAULT_SIZE / 224)

BLUR_KERNEL_SIZE = 9

VOC2007_CLASSES = 20
IMATERIALIST_ATTRIBUTES = 294


class GaussianBlur(v2.RandomApply):
    """Blur an image with a 9 x 9 Gaussian, sometimes.

    Args:
        p: probability that the image is blurred, in [0, 1].
        radius_min: smallest standard deviation in pixels, > 0.
        radius_max: largest one; each blur draws its own, uniformly.

    Raises:
        ValueError: `p` or the radii are out of range.
    """

    def __init__(self, *, p: float = 0.5, radius_min: float = 0.1, radius_max: float = 2.0) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p is the probability of blurring and lies in [0, 1], got {p}")
        if not 0 < radius_min <= radius_max:
            raise ValueError(f"expected 0 < radius_min <= radius_max, got {radius_min} and {radius_max}")
        super().__init__([v2.GaussianBlur(BLUR_KERNEL_SIZE, sigma=(radius_min, radius_max))], p=p)


def make_interpolation_mode(mode_str: str) -> v2.InterpolationMode:
    """The interpolation mode of a name.

    Args:
        mode_str: "bicubic", "bilinear", "box", "hamming", "lanczos", "nearest" or "nearest-exact".

    Returns:
        torchvision's mode.

    Raises:
        ValueError: there is no such mode.
    """
    modes = {mode.value: mode for mode in v2.InterpolationMode}
    if mode_str not in modes:
        raise ValueError(f"unknown interpolation mode {mode_str!r}; expected one of {', '.join(sorted(modes))}")
    return modes[mode_str]


def make_normalize_transform(
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> v2.Normalize:
    """Subtract a mean and divide by a standard deviation.

    Args:
        mean: per channel, for values in [0, 1].
        std: per channel.

    Returns:
        A transform of float tensors [..., 3, height, width].
    """
    return v2.Normalize(mean=list(mean), std=list(std))


def make_base_transform(
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> v2.Compose:
    """Turn uint8 pixels into what a backbone takes.

    Args:
        mean: per channel, of values in [0, 1].
        std: per channel.

    Returns:
        A transform from uint8 tensors [..., 3, height, width] to normalised float32.
    """
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), make_normalize_transform(mean, std)])


def make_classification_train_transform(
    *,
    crop_size: int = CROP_DEFAULT_SIZE,
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BICUBIC,
    hflip_prob: float = 0.5,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> v2.Compose:
    """Training images of a linear classifier: a random resized crop and a random flip.

    Args:
        crop_size: side of the result in pixels; the crop shows 8 to 100 % of the image's area, at an aspect ratio of
            3/4 to 4/3. Smaller images are enlarged.
        interpolation: of the resize.
        hflip_prob: probability of mirroring the crop.
        mean: per channel, of values in [0, 1].
        std: per channel.

    Returns:
        A transform from a PIL image to a normalised float32 tensor [3, crop_size, crop_size].
    """
    steps = [v2.ToImage(), v2.RandomResizedCrop(crop_size, interpolation=interpolation, antialias=True)]
    if hflip_prob > 0:
        steps.append(v2.RandomHorizontalFlip(hflip_prob))
    return v2.Compose([*steps, make_base_transform(mean, std)])


def make_resize_transform(
    *,
    resize_size: int,
    resize_square: bool = False,
    resize_large_side: bool = False,
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BICUBIC,
) -> v2.Resize:
    """Resize with antialiasing so that the shorter side (or another, by the flags) has a given length.

    Args:
        resize_size: the length in pixels.
        resize_square: both sides get it; the aspect ratio changes.
        resize_large_side: the longer side gets it; the aspect ratio stays.
        interpolation: of the resize.

    Returns:
        A transform of PIL images and tensors [..., height, width].

    Raises:
        ValueError: both flags are set.
    """
    if resize_square and resize_large_side:
        raise ValueError("resize_square and resize_large_side exclude each other: set at most one of them")
    if resize_square:
        return v2.Resize((resize_size, resize_size), interpolation=interpolation, antialias=True)
    if resize_large_side:
        return v2.Resize(None, max_size=resize_size, interpolation=interpolation, antialias=True)
    return v2.Resize(resize_size, interpolation=interpolation, antialias=True)


def make_eval_transform(
    *,
    resize_size: int = RESIZE_DEFAULT_SIZE,
    crop_size: int | None = CROP_DEFAULT_SIZE,
    resize_square: bool = False,
    resize_large_side: bool = False,
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BICUBIC,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> v2.Compose:
    """Evaluation images: resized and cut at the centre; nothing is random.

    Args:
        resize_size: length in pixels of the shorter side, unless a flag says otherwise.
        crop_size: side of the central crop; larger than the resized image: padded with black. 0 or None: no crop.
        resize_square: both sides get `resize_size`.
        resize_large_side: the longer side gets `resize_size`.
        interpolation: of the resize.
        mean: per channel, of values in [0, 1].
        std: per channel.

    Returns:
        A transform from a PIL image to a normalised float32 tensor [3, height, width].

    Raises:
        ValueError: both flags are set.
    """
    resize = make_resize_transform(
        resize_size=resize_size,
        resize_square=resize_square,
        resize_large_side=resize_large_side,
        interpolation=interpolation,
    )
    crop = [v2.CenterCrop(crop_size)] if crop_size else []
    return v2.Compose([v2.ToImage(), resize, *crop, make_base_transform(mean, std)])


def make_classification_eval_transform(
    *,
    resize_size: int = RESIZE_DEFAULT_SIZE,
    crop_size: int | None = CROP_DEFAULT_SIZE,
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BICUBIC,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> v2.Compose:
    """Evaluation images of a classifier: the shorter side resized, then the central crop.

    Args:
        resize_size: length of the shorter side in pixels.
        crop_size: side of the central crop; 0 or None: no crop.
        interpolation: of the resize.
        mean: per channel, of values in [0, 1].
        std: per channel.

    Returns:
        A transform from a PIL image to a normalised float32 tensor [3, height, width].
    """
    return make_eval_transform(
        resize_size=resize_size, crop_size=crop_size, interpolation=interpolation, mean=mean, std=std
    )


def voc2007_classification_target_transform(label: Any, n_categories: int = VOC2007_CLASSES) -> Tensor:
    """The classes present in an image of VOC 2007.

    Args:
        label: has `instances`, each with an integer `category_id`.
        n_categories: number of classes.

    Returns:
        int64 [n_categories], 1 where the class is present.
    """
    return _multi_hot([instance.category_id for instance in label.instances], n_categories)


def imaterialist_classification_target_transform(label: Any, n_categories: int = IMATERIALIST_ATTRIBUTES) -> Tensor:
    """The attributes of an iMaterialist image.

    Args:
        label: has `attributes`, integers.
        n_categories: number of attributes.

    Returns:
        int64 [n_categories], 1 where the attribute is present.
    """
    return _multi_hot(label.attributes, n_categories)


def get_target_transform(dataset_str: str) -> Callable[[Any], Tensor] | None:
    """The target transform of the datasets that have several labels per image.

    Args:
        dataset_str: a dataset string, such as "VOC2007:split=TRAIN".

    Returns:
        A function of a label, or None where labels are taken as they are.
    """
    if "VOC2007" in dataset_str:
        return voc2007_classification_target_transform
    if "IMaterialist" in dataset_str:
        return imaterialist_classification_target_transform
    return None


def _multi_hot(indices: Sequence[int], size: int) -> Tensor:
    present = torch.zeros(size, dtype=torch.int64)
    present[torch.as_tensor(indices, dtype=torch.int64)] = 1
    return present
