"""Transforms of images and their label maps.

Each takes and returns (image, label). Images are PIL RGB images. Labels are class ids, as PIL images of mode L, P, I or
I;16, or as NumPy arrays [H, W]; they become integer tensors [1, H, W].

Notable:
- Means and standard deviations are those of values in [0, 255].
- A resize by the shorter side rounds the longer one; torchvision truncates it. Published scores were taken this way.
- Training crops avoid single classes: up to ten are rejected where one fills three quarters of the labelled pixels.
- Padding is 0 after the normalisation, which is the mean colour, and "ignore" in the label.
- All draws come from torch's generator, which the loader seeds in each worker. Everything can be pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F_v1
from torchvision.transforms import v2

from dinov3.eval.dense.transforms import (
    BILINEAR,
    NEAREST,
    EqualSizes,
    ResizeV2,
    label_to_tensor,
    resize_image,
    resize_label,
    size_of,
)
from dinov3.eval.segmentation.metrics import IGNORE_INDEX, WIDE_UNSIGNED, preprocess_nonzero_labels
from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

__all__ = [
    "CustomResize",
    "FixedSideResize",
    "MaskToTensor",
    "MultiScaleResize",
    "NormalizeImage",
    "PILToTensor",
    "PadTensor",
    "PhotoMetricDistortion",
    "RandomCropWithLabel",
    "RandomHorizontalFlip",
    "ReduceZeroLabel",
    "ResizeV2",
    "make_segmentation_eval_transforms",
    "make_segmentation_train_transforms",
]

MEAN = tuple(255 * value for value in IMAGENET_DEFAULT_MEAN)
STD = tuple(255 * value for value in IMAGENET_DEFAULT_STD)

INFERENCE_MODES = ("whole", "slide")
#: Reduced copies of an image have shorter sides that are multiples of this.
REDUCED_SIDE_MULTIPLE = 32


class MaskToTensor:
    """A label map to a tensor [1, H, W]: uint8, or a wider integer for images of more than 8 bits.

    Raises:
        ValueError: when called: the map has several channels.
        TypeError: when called: it does not hold integers.
    """

    def __call__(self, img: Any, label: Any) -> tuple[Any, Tensor]:
        ids = label_to_tensor(label, "label map")
        if ids.is_floating_point():
            raise TypeError(f"a label map holds class ids, got {ids.dtype}: convert it to an integer dtype")
        return img, ids.to(torch.int32) if ids.dtype in WIDE_UNSIGNED else ids


class PILToTensor:
    """A PIL image to uint8 [3, H, W]."""

    def __call__(self, img: Image.Image, label: Any) -> tuple[Tensor, Any]:
        return v2.functional.pil_to_tensor(img), label


class FixedSideResize:
    """Resize to a shorter side; the longer one is rounded.

    Args:
        small_size: of the shorter side in pixels.
        image_interpolation: of the image.
        label_interpolation: of the label.
        resize_label: resize the label too.
    """

    def __init__(
        self,
        small_size: int,
        image_interpolation: v2.InterpolationMode = BILINEAR,
        label_interpolation: v2.InterpolationMode = NEAREST,
        resize_label: bool = True,
    ) -> None:
        self.small_size = small_size
        self.image_interpolation = image_interpolation
        self.label_interpolation = label_interpolation
        self.resize_label = resize_label

    def __call__(self, img: Any, label: Any) -> tuple[Any, Any]:
        size = _size_of_small_side(img, self.small_size)
        if self.resize_label:
            label = resize_label(label, size, self.label_interpolation)
        return resize_image(img, size, self.image_interpolation), label


class CustomResize:
    """Resize both, by a random factor if asked.

    Args:
        img_size: the shorter side (the longer one is rounded), or (height, width).
        image_interpolation: of the image.
        label_interpolation: of the label.
        random_img_size_ratio_range: sizes are multiplied by a uniform draw from this and truncated; None: they are not.
    """

    def __init__(
        self,
        img_size: int | Sequence[int],
        image_interpolation: v2.InterpolationMode = BILINEAR,
        label_interpolation: v2.InterpolationMode = NEAREST,
        random_img_size_ratio_range: Sequence[float] | None = None,
    ) -> None:
        self.sides = [img_size] if isinstance(img_size, int) else list(img_size)
        self.image_interpolation = image_interpolation
        self.label_interpolation = label_interpolation
        self.ratio_range = tuple(random_img_size_ratio_range) if random_img_size_ratio_range else (1.0, 1.0)

    def __call__(self, img: Any, label: Any) -> tuple[Any, Any]:
        ratio = _uniform(self.ratio_range)
        size = [max(1, int(side * ratio)) for side in self.sides]
        if len(size) == 1:
            size = _size_of_small_side(img, size[0])
        return (
            resize_image(img, size, self.image_interpolation),
            resize_label(label, size, self.label_interpolation),
        )


class MultiScaleResize:
    """Copies of an image at several sizes; the label stays.

    Args:
        small_size: shorter side of the copy of ratio 1.
        ratios: the shorter sides are `int(small_size * ratio)`, rounded up to a multiple of 32 for ratios below 1.
        image_interpolation: of the image.
    """

    def __init__(
        self, small_size: int, ratios: Sequence[float], image_interpolation: v2.InterpolationMode = BILINEAR
    ) -> None:
        self.small_sizes = [self._small_size(small_size, ratio) for ratio in ratios]
        self.image_interpolation = image_interpolation

    def _small_size(self, small_size: int, ratio: float) -> int:
        size = int(small_size * ratio)
        return -(-size // REDUCED_SIDE_MULTIPLE) * REDUCED_SIDE_MULTIPLE if ratio < 1 else size

    def __call__(self, img: Any, label: Any) -> tuple[list[Any], Any]:
        sizes = [_size_of_small_side(img, small_size) for small_size in self.small_sizes]
        return [resize_image(img, size, self.image_interpolation) for size in sizes], label


class ReduceZeroLabel:
    """Class ids from 0 of labels that count from 1: see `preprocess_nonzero_labels`.

    Args:
        ignore_index: what label 0 becomes.
    """

    def __init__(self, ignore_index: int = IGNORE_INDEX) -> None:
        self.ignore_index = ignore_index

    def __call__(self, img: Any, label: Tensor) -> tuple[Any, Tensor]:
        return img, preprocess_nonzero_labels(label, self.ignore_index)


class RandomCropWithLabel:
    """Cut the same random part from both, where possible one with several classes.

    Up to ten parts are rejected which do not hold two classes, or where one class fills too much.

    Args:
        crop_size: (height, width), or the side of a square. A side of the image that is smaller is kept whole.
        cat_max_ratio: from this share of the labelled pixels on, a class fills too much.
        ignore_index: label of pixels that do not count.
    """

    N_REJECTED = 10

    def __init__(
        self, crop_size: int | Sequence[int], cat_max_ratio: float = 0.75, ignore_index: int = IGNORE_INDEX
    ) -> None:
        self.crop_size = _pair(crop_size)
        self.cat_max_ratio = cat_max_ratio
        self.ignore_index = ignore_index

    def __call__(self, img: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = self._draw(size_of(img))
        for _ in range(self.N_REJECTED):
            if self._is_mixed(label[..., rows, columns]):
                break
            rows, columns = self._draw(size_of(img))
        return img[..., rows, columns], label[..., rows, columns]

    def _draw(self, size: tuple[int, int]) -> tuple[slice, slice]:
        crop = [min(side, crop_side) for side, crop_side in zip(size, self.crop_size, strict=True)]
        top, left = (int(torch.randint(side - part + 1, ())) for side, part in zip(size, crop, strict=True))
        return slice(top, top + crop[0]), slice(left, left + crop[1])

    def _is_mixed(self, label: Tensor) -> bool:
        counts = label[label != self.ignore_index].unique(return_counts=True)[1]
        return len(counts) > 1 and bool(counts.max() < self.cat_max_ratio * counts.sum())


class RandomHorizontalFlip:
    """Mirror both.

    Args:
        p: probability, in [0, 1].

    Raises:
        ValueError: `p` is out of range.
    """

    def __init__(self, p: float) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"flip_prob is a probability in [0, 1], got {p}")
        self.p = p

    def __call__(self, img: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        return (img.flip(-1), label.flip(-1)) if _happens(self.p) else (img, label)


class PhotoMetricDistortion:
    """Change brightness, contrast, saturation and hue, each of half of the images.

    Contrast comes before or after the colours, at random. Every step ends with whole numbers in [0, 255], cut off, not
    rounded: published heads were trained so.

    Args:
        brightness_delta: brightness is added, from [-this, this].
        contrast_range: of the factor of all values.
        saturation_range: of the factor of the saturation.
        hue_range: of the shift of the hue, within [-0.5, 0.5], half a turn each way.
    """

    def __init__(
        self,
        brightness_delta: float = 32,
        contrast_range: Sequence[float] = (0.5, 1.5),
        saturation_range: Sequence[float] = (0.5, 1.5),
        hue_range: Sequence[float] = (-0.5, 0.5),
    ) -> None:
        self.brightness_range = (-brightness_delta, brightness_delta)
        self.contrast_range = tuple(contrast_range)
        self.saturation_range = tuple(saturation_range)
        self.hue_range = tuple(hue_range)

    def __call__(self, img: Tensor, label: Any) -> tuple[Tensor, Any]:
        """uint8 [3, H, W] to float32 in [0, 255]; the label stays."""
        if _happens():
            img = self.convert(img, beta=_uniform(self.brightness_range))
        contrast_first = _happens()
        if contrast_first:
            img = self._change_contrast(img)
        if _happens():
            img = F_v1.adjust_saturation(img, _uniform(self.saturation_range))
        if _happens():
            img = F_v1.adjust_hue(img, _uniform(self.hue_range))
        if not contrast_first:
            img = self._change_contrast(img)
        return img.float(), label

    def _change_contrast(self, img: Tensor) -> Tensor:
        return self.convert(img, alpha=_uniform(self.contrast_range)) if _happens() else img

    def convert(self, img: Tensor | np.ndarray, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
        """`alpha * img + beta`, cut to whole numbers in [0, 255]: uint8 of any shape to uint8."""
        return (torch.as_tensor(img).float() * alpha + beta).clamp(0, 255).to(torch.uint8)


class NormalizeImage:
    """An image of values in [0, 255] to float32 with a mean and standard deviation of about 0 and 1.

    Args:
        mean: per channel, of values in [0, 255].
        std: per channel.
    """

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        self.mean = list(mean)
        self.std = list(std)

    def __call__(self, img: Tensor, label: Any) -> tuple[Tensor, Any]:
        return v2.functional.normalize(img.float(), self.mean, self.std), label


class PadTensor:
    """Bring both to one size: on the right and below, the image is padded with 0 and the label with "ignore", or cut.

    Args:
        pad_shape: (height, width), or the side of a square.
        ignore_index: what the label is padded with.
    """

    def __init__(self, pad_shape: int | Sequence[int], ignore_index: int = IGNORE_INDEX) -> None:
        self.pad_shape = _pair(pad_shape)
        self.ignore_index = ignore_index

    def __call__(self, img: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        return self._pad(img, 0), self._pad(label, self.ignore_index)

    def _pad(self, x: Tensor, value: int) -> Tensor:
        height, width = size_of(x)
        return F.pad(x, (0, self.pad_shape[1] - width, 0, self.pad_shape[0] - height), value=value)


def make_segmentation_train_transforms(
    *,
    img_size: int | Sequence[int] | None = None,
    image_interpolation: v2.InterpolationMode = BILINEAR,
    label_interpolation: v2.InterpolationMode = NEAREST,
    random_img_size_ratio_range: Sequence[float] | None = None,
    crop_size: int | Sequence[int] | None = None,
    flip_prob: float = 0.0,
    reduce_zero_label: bool = False,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> v2.Compose:
    """Training pairs: resized, cut, mirrored, recoloured, normalised, padded.

    Args:
        img_size: the shorter side, or (height, width); None: no resize.
        image_interpolation: of the image, which Pillow resizes.
        label_interpolation: of the label.
        random_img_size_ratio_range: `img_size` is multiplied by a draw from this; None: it is not.
        crop_size: (height, width), or the side of a square; smaller images are padded. None: neither crop nor padding.
        flip_prob: probability of the mirror image.
        reduce_zero_label: label 0 means "unlabelled" and classes count from 1.
        mean: per channel, of values in [0, 255].
        std: per channel.

    Returns:
        A transform of (image, label) to float32 [3, H, W] and integers [1, H, W], uint8 for 8-bit labels.

    Raises:
        ValueError: a setting is out of range; when called: image and label differ in size.
    """
    if random_img_size_ratio_range and not img_size:
        raise ValueError("random_img_size_ratio_range multiplies img_size, which is not given")
    resize = []
    if img_size:
        resize = [CustomResize(img_size, image_interpolation, label_interpolation, random_img_size_ratio_range)]
    return v2.Compose(
        [
            EqualSizes("label map"),
            MaskToTensor(),
            *resize,
            PILToTensor(),
            *([ReduceZeroLabel()] if reduce_zero_label else []),
            *([RandomCropWithLabel(crop_size)] if crop_size else []),
            RandomHorizontalFlip(flip_prob),
            PhotoMetricDistortion(),
            NormalizeImage(mean, std),
            *([PadTensor(crop_size)] if crop_size else []),
        ]
    )


def make_segmentation_eval_transforms(
    *,
    img_size: int | Sequence[int] | None = None,
    inference_mode: str = "whole",
    image_interpolation: v2.InterpolationMode = BILINEAR,
    label_interpolation: v2.InterpolationMode = NEAREST,
    use_tta: bool = False,
    tta_ratios: Sequence[float] = (1.0,),
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> v2.Compose:
    """Evaluation pairs: a list of what a model sees of an image, and the label; nothing is random.

    Args:
        img_size: the shorter side, or (height, width); None: no resize.
        inference_mode: "slide" keeps the size of the label where `img_size` is one number; "whole" resizes it with the
            image.
        image_interpolation: of the image, which Pillow resizes.
        label_interpolation: of the label.
        use_tta: the image at several sizes, then all of them mirrored, in the same order; the label keeps its size.
        tta_ratios: of these sizes to `img_size`.
        mean: per channel, of values in [0, 255].
        std: per channel.

    Returns:
        A transform of (image, label) to a list of float32 [3, H, W], and integers [1, h, w], uint8 for 8-bit labels.

    Raises:
        ValueError: there is no such mode, or `use_tta` without one number as `img_size`.
    """
    if inference_mode not in INFERENCE_MODES:
        raise ValueError(f"inference_mode={inference_mode!r}: expected one of {', '.join(INFERENCE_MODES)}")
    resize: list[Any] = []
    if use_tta:
        if not isinstance(img_size, int):
            raise ValueError(f"use_tta needs one number as img_size, the shorter side at ratio 1, got {img_size!r}")
        resize = [MultiScaleResize(img_size, tta_ratios, image_interpolation)]
    elif isinstance(img_size, int):
        both = inference_mode != "slide"
        resize = [FixedSideResize(img_size, image_interpolation, label_interpolation, resize_label=both)]
    elif img_size:
        resize = [ResizeV2(img_size, image_interpolation, label_interpolation)]
    return v2.Compose([MaskToTensor(), *resize, _NormalizedImages(mean, std, add_mirrored=use_tta)])


class _NormalizedImages:
    def __init__(self, mean: Sequence[float], std: Sequence[float], *, add_mirrored: bool) -> None:
        self.normalize = NormalizeImage(mean, std)
        self.add_mirrored = add_mirrored

    def __call__(self, images: Any, label: Any) -> tuple[list[Tensor], Any]:
        images = images if isinstance(images, list) else [images]
        tensors = [self.normalize(v2.functional.pil_to_tensor(image), None)[0] for image in images]
        return [*tensors, *(tensor.flip(-1) for tensor in tensors if self.add_mirrored)], label


def _size_of_small_side(img: Any, small_size: int) -> list[int]:
    height, width = size_of(img)
    if height > width:
        return [int(small_size * height / width + 0.5), small_size]
    return [small_size, int(small_size * width / height + 0.5)]


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _happens(probability: float = 0.5) -> bool:
    return bool(torch.rand(()) < probability)


def _uniform(bounds: Sequence[float]) -> float:
    low, high = bounds
    return low + (high - low) * float(torch.rand(()))
