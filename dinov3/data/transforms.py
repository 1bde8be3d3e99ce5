"""Image transforms of the evaluations: to tensor, resize, crop, normalise.

Images are resized as uint8 tensors, with antialiasing. Published evaluation numbers were taken this way; a resize of
floats or by Pillow gives other pixels. `SAT_DEFAULT_MEAN` and `SAT_DEFAULT_STD` belong to the models that were
pretrained on satellite images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from dinov3.data.images import to_rgb
from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_MEAN as IMAGENET_DEFAULT_MEAN
from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_STD as IMAGENET_DEFAULT_STD
from dinov3.utils.pixel_statistics import SAT_DEFAULT_MEAN as SAT_DEFAULT_MEAN
from dinov3.utils.pixel_statistics import SAT_DEFAULT_STD as SAT_DEFAULT_STD

CROP_DEFAULT_SIZE = 224
RESIZE_DEFAULT_SIZE = int(256 * CROP_DEFAULT_SIZE / 224)

VOC2007_CLASSES = 20
IMATERIALIST_ATTRIBUTES = 294


class ToRGB(nn.Module):
    """Convert a PIL image of any mode to a uint8 tensor image as `dinov3.data.images.to_rgb` does; keep tensors."""

    def forward(self, picture: Any) -> tv_tensors.Image:
        return v2.functional.to_image(to_rgb(picture) if isinstance(picture, Image.Image) else picture)


def make_base_transform(
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> v2.Compose:
    """Make the transform from uint8 tensors [..., 3, height, width] to the normalised float32 that a backbone takes.

    Args:
        mean: per channel, for values in [0, 1].
        std: per channel.
    """
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


def make_classification_train_transform(
    *,
    crop_size: int = CROP_DEFAULT_SIZE,
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BICUBIC,
    hflip_prob: float = 0.5,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> v2.Compose:
    """Make the transform for the training of a linear classifier: a random resized crop and a random flip.

    Args:
        crop_size: side of the result in pixels; the crop shows 8 to 100 % of the image's area, at an aspect ratio of
            3/4 to 4/3. Smaller images are enlarged.
        interpolation: of the resize.
        hflip_prob: probability of mirroring the crop.
        mean: per channel, for values in [0, 1].
        std: per channel.

    Returns:
        A transform from a PIL image to a normalised float32 tensor [3, crop_size, crop_size].
    """
    steps = [ToRGB(), v2.RandomResizedCrop(crop_size, interpolation=interpolation, antialias=True)]
    if hflip_prob > 0:
        steps.append(v2.RandomHorizontalFlip(hflip_prob))
    return v2.Compose([*steps, make_base_transform(mean, std)])


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
    """Make a transform for evaluations: resize, then crop the centre; nothing is random.

    Args:
        resize_size: length in pixels of the shorter side, unless a flag says otherwise.
        crop_size: side of the central crop, padded with black if it is larger than the resized image. 0 or None for no
            crop.
        resize_square: resize both sides to `resize_size`, which changes the aspect ratio.
        resize_large_side: resize the longer side to `resize_size`.
        interpolation: of the resize.
        mean: per channel, for values in [0, 1].
        std: per channel.

    Returns:
        A transform from a PIL image to a normalised float32 tensor [3, height, width].

    Raises:
        ValueError: both flags are set.
    """
    if resize_square and resize_large_side:
        raise ValueError("resize_square and resize_large_side exclude each other: set at most one of them")
    resize = v2.Resize(
        None if resize_large_side else (resize_size, resize_size) if resize_square else resize_size,
        max_size=resize_size if resize_large_side else None,
        interpolation=interpolation,
        antialias=True,
    )
    crop = [v2.CenterCrop(crop_size)] if crop_size else []
    return v2.Compose([ToRGB(), resize, *crop, make_base_transform(mean, std)])


def make_classification_eval_transform(
    *,
    resize_size: int = RESIZE_DEFAULT_SIZE,
    crop_size: int | None = CROP_DEFAULT_SIZE,
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BICUBIC,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> v2.Compose:
    """Make the transform for the evaluation of a classifier: resize the shorter side, then crop the centre.

    Args:
        resize_size: length of the shorter side in pixels.
        crop_size: side of the central crop; 0 or None for no crop.
        interpolation: of the resize.
        mean: per channel, for values in [0, 1].
        std: per channel.

    Returns:
        A transform from a PIL image to a normalised float32 tensor [3, height, width].
    """
    return make_eval_transform(
        resize_size=resize_size, crop_size=crop_size, interpolation=interpolation, mean=mean, std=std
    )


def voc2007_classification_target_transform(label: Any, n_categories: int = VOC2007_CLASSES) -> Tensor:
    """Return which classes an image of VOC 2007 shows.

    Args:
        label: has `instances`, each with an integer `category_id`.
        n_categories: number of classes.

    Returns:
        int64 [n_categories], 1 where the class is present.
    """
    return _multi_hot([instance.category_id for instance in label.instances], n_categories)


def imaterialist_classification_target_transform(label: Any, n_categories: int = IMATERIALIST_ATTRIBUTES) -> Tensor:
    """Return which attributes an iMaterialist image has.

    Args:
        label: has `attributes`, integers.
        n_categories: number of attributes.

    Returns:
        int64 [n_categories], 1 where the attribute is present.
    """
    return _multi_hot(label.attributes, n_categories)


def get_target_transform(dataset_str: str) -> Callable[[Any], Tensor] | None:
    """Return the target transform of a dataset with several labels per image.

    Args:
        dataset_str: a dataset string, such as "VOC2007:split=TRAIN".

    Returns:
        A function of a label, or None if labels are used as they are.
    """
    name = dataset_str.partition(":")[0]  # not in a path such as root=/data/VOC2007
    if "VOC2007" in name:
        return voc2007_classification_target_transform
    if "IMaterialist" in name:
        return imaterialist_classification_target_transform
    return None


def _multi_hot(indices: Sequence[int], size: int) -> Tensor:
    present = torch.zeros(size, dtype=torch.int64)
    present[torch.as_tensor(indices, dtype=torch.int64)] = 1
    return present
