"""Images as the published models expect them: which normalisation belongs to which weights.

Notable:
- Two recipes were published, and they differ: resizing bytes and then converting to floats, or the other way round.
  Values differ by the rounding to 1/255: about 0.006 on average after normalisation, 0.02 at most.
- A model with a head of its own follows the head: CHMv2 has other statistics than the satellite backbone in it.
- A ViT does not see rows and columns beyond the last whole patch: sizes should be multiples of 16 (ConvNeXt: of 32).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov3.hub.backbones import Weights
from dinov3.hub.depthers import DepthWeights
from dinov3.hub.segmentors import SegmentorWeights
from dinov3.utils import pixel_statistics
from dinov3.utils.integers import as_pair
from dinov3.utils.messages import check_choice

__all__ = ["Normalization", "make_transform", "normalization_of"]

#: The mean for the canopy height model; its standard deviations are those of the satellite images.
CHMV2_MEAN = (0.420, 0.411, 0.296)
OVERSHOOT = 0.25  # of bicubic resizing, beyond black and white
ORDERS = ("resize_uint8_then_float", "float_then_resize")


class Normalization(NamedTuple):
    """Statistics of the three channels, of values in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def normalization_of(weights: Weights | DepthWeights | SegmentorWeights | str | os.PathLike[str]) -> Normalization:
    """Return the statistics that images were normalised with when these weights were trained.

    Args:
        weights: `Weights.LVD1689M` (those of ImageNet) or `Weights.SAT493M` (satellite images), or of a depth model
            `DepthWeights.SYNTHMIX` (ImageNet) or `DepthWeights.CHMV2` (satellite images, of its own), or of the
            segmentor `SegmentorWeights.ADE20K` (ImageNet), or their names; or a path or URL whose last part
            names one of them, as those of the published files do.

    Raises:
        ValueError: the name contains none or several of them.
    """
    data = _data_of(weights)
    if data is DepthWeights.CHMV2:
        return Normalization(CHMV2_MEAN, pixel_statistics.SAT_DEFAULT_STD)
    if data is Weights.SAT493M:
        return Normalization(pixel_statistics.SAT_DEFAULT_MEAN, pixel_statistics.SAT_DEFAULT_STD)
    return Normalization(pixel_statistics.IMAGENET_DEFAULT_MEAN, pixel_statistics.IMAGENET_DEFAULT_STD)


def make_transform(
    resize_size: int | Sequence[int] | None = 256,
    *,
    weights: Weights | DepthWeights | SegmentorWeights | str | os.PathLike[str] = Weights.LVD1689M,
    order: str = "resize_uint8_then_float",
) -> Callable[[Any], Tensor]:
    """Make a function that resizes a picture without a crop (bilinear, antialiased) and normalises it for a backbone.

    Args:
        resize_size: height and width in pixels; one number is both, so the aspect ratio changes. None keeps the size,
            for depth models, which pad.
        weights: decides the normalisation, see `normalization_of`.
        order: `resize_uint8_then_float`, or `float_then_resize`: as Hugging Face's image processor, and as the
            reference features of the published models were made.

    Returns:
        A function from a picture, that is a PIL image of any mode (see `dinov3.data.images.to_rgb`), a
        NumPy array [H, W, 3] or a tensor [..., 3, H, W] (uint8, uint16 or floats in [0, 1]), to a float32 tensor
        [..., 3, height, width].

    Raises:
        ValueError: an argument is not as described; the function raises it for a picture that is not.
        ModuleNotFoundError: the package torchvision is missing.
    """
    check_choice("order", order, ORDERS)
    mean, std = normalization_of(weights)
    v2 = _import_v2()
    steps = [v2.ToDtype(torch.float32, scale=True)]
    if resize_size is not None:
        try:
            size = as_pair(resize_size)
        except (TypeError, ValueError):
            size = (0, 0)
        if min(size) <= 0:
            raise ValueError(
                f"resize_size must be a positive number of pixels, or height and width, got {resize_size!r}"
            )
        steps.insert(0, v2.Resize(size, interpolation=v2.InterpolationMode.BILINEAR, antialias=True))
    if order == "float_then_resize":
        steps.reverse()
    return v2.Compose([_to_rgb, *steps, v2.Normalize(list(mean), list(std)), v2.ToPureTensor()])


def _data_of(
    weights: Weights | DepthWeights | SegmentorWeights | str | os.PathLike[str],
) -> Weights | DepthWeights | SegmentorWeights:
    if isinstance(weights, Weights | DepthWeights | SegmentorWeights):
        return weights
    name = os.fspath(weights).partition("?")[0].rstrip("/").rpartition("/")[2]
    known = [*Weights, *DepthWeights, *SegmentorWeights]
    found = {data for data in known if re.search(rf"(?<![a-z0-9]){data.name}(?![a-z0-9])", name, re.IGNORECASE)}
    if len(found) != 1:
        raise ValueError(
            f"weights={name!r} does not say what it was trained on: give {' or '.join(map(str, known))} "
            "(satellite images are normalised differently)"
        )
    return found.pop()


def _to_rgb(picture: Any) -> Any:
    v2 = _import_v2()
    if hasattr(picture, "convert"):  # A PIL image; PIL itself may be missing.
        from dinov3.data.images import to_rgb

        picture = to_rgb(picture)
    image = v2.functional.to_image(picture)
    if image.shape[-3] != 3:
        raise ValueError(f"expected a picture of 3 channels (red, green, blue), got {image.shape[-3]}")
    if image.dtype == torch.uint16:
        return image.float() / 65535  # torchvision cannot resize these
    if image.is_floating_point():
        low, high = image.aminmax()
        if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
            raise ValueError(
                f"a picture of floats has values from 0 (black) to 1 (white), got {low:g} to {high:g}: divide it by "
                "the number that means white (255 for bytes), and do not normalise it before"
            )
    elif image.dtype != torch.uint8:
        raise ValueError(f"a picture has numbers of type uint8, uint16, or floats from 0 to 1, got {image.dtype}")
    return image


def _import_v2() -> Any:
    try:
        from torchvision.transforms import v2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"to transform images: pip install {error.name}", name=error.name) from error
    return v2
