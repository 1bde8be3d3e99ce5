"""Transforms of images and their label maps.

Each takes and returns (image, label). Images are PIL RGB images. Labels are class ids, as PIL images of mode L, P, I or
I;16, or as NumPy arrays [H, W]; they become integer tensors [1, H, W]. All draws come from torch's generator, which the
loader seeds in each worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    NormalizeImage,
    ResizeV2,
    label_to_tensor,
    size_of,
)
from dinov3.eval.segmentation.metrics import IGNORE_INDEX, WIDE_UNSIGNED, preprocess_nonzero_labels
from dinov3.utils.integers import as_integers, as_pair
from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

# Of values in [0, 255].
MEAN = tuple(255 * value for value in IMAGENET_DEFAULT_MEAN)
STD = tuple(255 * value for value in IMAGENET_DEFAULT_STD)

INFERENCE_MODES = ("whole", "slide")
#: Reduced copies of an image have shorter sides that are multiples of this.
REDUCED_SIDE_MULTIPLE = 32


class MaskToTensor:
    """Convert a label map to a tensor [1, H, W]: uint8, or a wider integer for images of more than 8 bits.

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
    """Convert a PIL image to uint8 [3, H, W]."""

    def __call__(self, img: Image.Image, label: Any) -> tuple[Tensor, Any]:
        return v2.functional.pil_to_tensor(img), label


class FixedSideResize(ResizeV2):
    """Resize to a shorter side. The longer one is rounded, as for published scores; torchvision truncates it."""

    def size_for(self, img: Any) -> list[int]:
        """Return [height, width] for an image."""
        height, width = size_of(img)
        (short,) = self.size
        if height > width:
            return [int(short * height / width + 0.5), short]
        return [short, int(short * width / height + 0.5)]


class CustomResize:
    """Resize both, by a random factor if asked.

    Args:
        img_size: the shorter side (the longer one is rounded), or (height, width).
        image_interpolation: of the image.
        label_interpolation: of the label.
        random_img_size_ratio_range: sizes are multiplied by a uniform draw from this and truncated. Default: no factor.
    """

    def __init__(
        self,
        img_size: int | Sequence[int],
        image_interpolation: v2.InterpolationMode = BILINEAR,
        label_interpolation: v2.InterpolationMode = NEAREST,
        random_img_size_ratio_range: Sequence[float] | None = None,
    ) -> None:
        self.sides = as_integers(img_size)
        self.interpolations = image_interpolation, label_interpolation
        self.ratio_range = tuple(random_img_size_ratio_range or (1.0, 1.0))

    def __call__(self, img: Any, label: Any) -> tuple[Any, Any]:
        ratio = _uniform(self.ratio_range)
        size = [max(1, int(side * ratio)) for side in self.sides]
        resize = FixedSideResize if len(size) == 1 else ResizeV2
        return resize(size, *self.interpolations)(img, label)


class MultiScaleResize:
    """Make copies of an image at several sizes; the label stays.

    Args:
        small_size: shorter side of the copy of ratio 1.
        ratios: the shorter sides are `int(small_size * ratio)`, rounded up to a multiple of 32 for ratios below 1.
    """

    def __init__(self, small_size: int, ratios: Sequence[float]) -> None:
        sizes = [(int(small_size * ratio), REDUCED_SIDE_MULTIPLE if ratio < 1 else 1) for ratio in ratios]
        self.resizes = [
            FixedSideResize(-(-size // multiple) * multiple, resize_label=False) for size, multiple in sizes
        ]

    def __call__(self, img: Any, label: Any) -> tuple[list[Any], Any]:
        return [resize(img, None)[0] for resize in self.resizes], label


class ReduceZeroLabel:
    """Make class ids count from 0, see `preprocess_nonzero_labels`."""

    def __call__(self, img: Any, label: Tensor) -> tuple[Any, Tensor]:
        return img, preprocess_nonzero_labels(label)


class RandomCropWithLabel:
    """Cut the same random part from both, if possible one with several classes.

    Up to ten parts are rejected that do not hold two classes, or in which one class fills too much.

    Args:
        crop_size: (height, width), or the side of a square. A side of the image that is smaller is kept whole.
    """

    N_REJECTED = 10
    #: From this share of the labelled pixels on, a class fills too much.
    MAX_CLASS_SHARE = 0.75

    def __init__(self, crop_size: int | Sequence[int]) -> None:
        self.crop_size = as_pair(crop_size)

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
        counts = label[label != IGNORE_INDEX].unique(return_counts=True)[1]
        return len(counts) > 1 and bool(counts.max() < self.MAX_CLASS_SHARE * counts.sum())


class RandomHorizontalFlip:
    """Flip both with a probability.

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

    Contrast comes before or after the colours, at random. Every step ends with whole numbers in [0, 255], truncated and
    not rounded: published heads were trained that way.

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
        """Change an image uint8 [3, H, W] to float32 in [0, 255]; the label stays."""
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
        """Compute `alpha * img + beta`, clipped and truncated to whole numbers in [0, 255], for uint8 of any shape."""
        return (torch.as_tensor(img).float() * alpha + beta).clamp(0, 255).to(torch.uint8)


class PadTensor:
    """Bring both to one size: on the right and below they are padded, the label with "ignore", or cut.

    The image is padded with 0, which after the normalisation is the mean colour.

    Args:
        pad_shape: (height, width), or the side of a square.
    """

    def __init__(self, pad_shape: int | Sequence[int]) -> None:
        self.pad_shape = as_pair(pad_shape)

    def __call__(self, img: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        height, width = size_of(img)
        margins = (0, self.pad_shape[1] - width, 0, self.pad_shape[0] - height)
        return F.pad(img, margins), F.pad(label, margins, value=IGNORE_INDEX)


def make_segmentation_train_transforms(
    *,
    img_size: int | Sequence[int] | None = None,
    random_img_size_ratio_range: Sequence[float] | None = None,
    crop_size: int | Sequence[int] | None = None,
    flip_prob: float = 0.0,
    reduce_zero_label: bool = False,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> v2.Compose:
    """Make the transforms of training pairs: resize, crop, flip, distort colours, normalise, pad.

    Args:
        img_size: the shorter side, or (height, width). Default: no resize.
        random_img_size_ratio_range: `img_size` is multiplied by a draw from this. Default: no factor.
        crop_size: (height, width), or the side of a square; smaller images are padded. Default: no crop, no padding.
        flip_prob: probability of a horizontal flip.
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
    resize = CustomResize(img_size, random_img_size_ratio_range=random_img_size_ratio_range) if img_size else None
    steps = [
        EqualSizes("label map"),
        MaskToTensor(),
        resize,
        PILToTensor(),
        ReduceZeroLabel() if reduce_zero_label else None,
        RandomCropWithLabel(crop_size) if crop_size else None,
        RandomHorizontalFlip(flip_prob),
        PhotoMetricDistortion(),
        NormalizeImage(mean, std),
        PadTensor(crop_size) if crop_size else None,
    ]
    return v2.Compose([step for step in steps if step is not None])


def make_segmentation_eval_transforms(
    *,
    img_size: int | Sequence[int] | None = None,
    inference_mode: str = "whole",
    use_tta: bool = False,
    tta_ratios: Sequence[float] = (1.0,),
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> v2.Compose:
    """Make the transforms of evaluation pairs, in which nothing is random.

    Args:
        img_size: the shorter side, or (height, width). Default: no resize.
        inference_mode: "slide" keeps the size of the label if `img_size` is one number; "whole" resizes it with the
            image.
        use_tta: give the image at several sizes, then all of them flipped, in the same order; the label keeps its size.
        tta_ratios: of these sizes to `img_size`.
        mean: per channel, of values in [0, 255].
        std: per channel.

    Returns:
        A transform of (image, label) to a list of float32 [3, H, W], and integers [1, h, w], uint8 for 8-bit labels.

    Raises:
        ValueError: the mode is unknown, or `use_tta` is given and `img_size` is not one number.
    """
    if inference_mode not in INFERENCE_MODES:
        raise ValueError(f"inference_mode={inference_mode!r}: expected one of {', '.join(INFERENCE_MODES)}")
    resize: list[Any] = []
    if use_tta:
        if img_size is None or isinstance(img_size, Iterable):
            raise ValueError(f"use_tta needs one number as img_size, the shorter side at ratio 1, got {img_size!r}")
        resize = [MultiScaleResize(img_size, tta_ratios)]
    elif isinstance(img_size, Iterable):
        resize = [ResizeV2(img_size)]
    elif img_size is not None:
        resize = [FixedSideResize(img_size, resize_label=inference_mode != "slide")]
    return v2.Compose([MaskToTensor(), *resize, _NormalizedImages(mean, std, add_flipped=use_tta)])


class _NormalizedImages:
    def __init__(self, mean: Sequence[float], std: Sequence[float], *, add_flipped: bool) -> None:
        self.normalize = NormalizeImage(mean, std)
        self.add_flipped = add_flipped

    def __call__(self, images: Any, label: Any) -> tuple[list[Tensor], Any]:
        images = images if isinstance(images, list) else [images]
        tensors = [self.normalize(v2.functional.pil_to_tensor(image), None)[0] for image in images]
        return [*tensors, *(tensor.flip(-1) for tensor in tensors if self.add_flipped)], label


def _happens(probability: float = 0.5) -> bool:
    return bool(torch.rand(()) < probability)


def _uniform(bounds: Sequence[float]) -> float:
    low, high = bounds
    return low + (high - low) * float(torch.rand(()))
