"""Transforms that depth and segmentation share: resizing an image together with its map of labels, normalisation.

Each takes and returns (image, label). A label is what a dataset delivers, or a tensor once it was converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from dinov3.utils.integers import as_integers

BILINEAR = v2.InterpolationMode.BILINEAR
NEAREST = v2.InterpolationMode.NEAREST


def size_of(x: Image.Image | np.ndarray | Tensor) -> tuple[int, int]:
    """Return height and width of a PIL image, or of an array or tensor [..., H, W]."""
    if isinstance(x, Image.Image):
        return x.height, x.width
    return int(x.shape[-2]), int(x.shape[-1])


class EqualSizes:
    """Refuse an image and a label of different sizes, because random crops cut the same place out of both.

    Args:
        label_name: what the label is called in the error.

    Raises:
        ValueError: when called: their sizes differ.
    """

    def __init__(self, label_name: str) -> None:
        self.label_name = label_name

    def __call__(self, img: Any, label: Any) -> tuple[Any, Any]:
        if size_of(img) != size_of(label):
            (height, width), (label_height, label_width) = size_of(img), size_of(label)
            raise ValueError(
                f"the image is {height} x {width} (height x width) and its {self.label_name} {label_height} x "
                f"{label_width}: training needs both at one size; resize one of them in the dataset"
            )
        return img, label


class ResizeV2:
    """Resize the image, with antialiasing, and if asked its label.

    Args:
        size: (height, width), or the shorter side; the longer one is then truncated.
        image_interpolation: of the image.
        label_interpolation: of the label.
        resize_label: resize the label too.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        image_interpolation: v2.InterpolationMode = BILINEAR,
        label_interpolation: v2.InterpolationMode = NEAREST,
        resize_label: bool = True,
    ) -> None:
        self.size = as_integers(size)
        self.image_interpolation = image_interpolation
        self.label_interpolation = label_interpolation
        self.resize_label = resize_label

    def __call__(self, img: Any, label: Any) -> tuple[Any, Any]:
        size = self.size_for(img)
        img = v2.functional.resize(img, size, interpolation=self.image_interpolation, antialias=True)
        if not self.resize_label:
            return img, label
        if not isinstance(label, np.ndarray):
            return img, v2.functional.resize(label, size, interpolation=self.label_interpolation, antialias=True)
        # The nearest pixel as PIL takes it, the one that holds the centre: it fits resized PIL images.
        exact = v2.InterpolationMode.NEAREST_EXACT if self.label_interpolation is NEAREST else self.label_interpolation
        return img, v2.functional.resize(label_to_tensor(label, "label"), size, interpolation=exact)[0].numpy()

    def size_for(self, img: Any) -> list[int]:
        """Return the size as torchvision takes it: [height, width], or [shorter side]."""
        return self.size


class NormalizeImage:
    """Bring an image to a mean of about 0 and a standard deviation of about 1, float32.

    Args:
        mean: per channel, in the range of the image's values.
        std: per channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = list(mean)
        self.std = list(std)

    def __call__(self, img: Tensor, label: Any) -> tuple[Tensor, Any]:
        return v2.functional.normalize(img.float(), self.mean, self.std), as_plain_tensor(label)


def label_to_tensor(label: Any, what: str) -> Tensor:
    """Convert a single-channel label map.

    Args:
        label: a PIL image of mode L, P, 1, I, I;16 or F, or an array or tensor [H, W] or [1, H, W].
        what: what it is called in errors, e.g. "depth map".

    Returns:
        [1, H, W]: uint8 for 8-bit images, uint16 for 16-bit ones, int32 or float32 for the others. Arrays keep their
        dtype, but floating-point ones become float32.

    Raises:
        ValueError: it has several channels.
        TypeError: it is something else.
    """
    if isinstance(label, Image.Image) and len(label.getbands()) != 1:
        raise ValueError(f"a {what} has one channel, got a PIL image of mode {label.mode!r}")
    if not isinstance(label, Image.Image | Tensor | np.ndarray):
        raise TypeError(f"a {what} is a PIL image, a NumPy array or a tensor, got {type(label).__name__}")
    array = np.asarray(label.detach().cpu() if isinstance(label, Tensor) else label)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2:
        raise ValueError(f"a {what} has shape [H, W] or [1, H, W], got {tuple(array.shape)}")
    dtype: Any = {"b": np.uint8, "f": np.float32}.get(array.dtype.kind, array.dtype.newbyteorder("="))
    # A copy: PIL's buffer is read-only, and what a dataset keeps in memory must not change with the sample.
    return torch.from_numpy(np.array(array, dtype=dtype))[None]


def as_plain_tensor(x: Any) -> Any:
    """Return a tensor without the class by which torchvision's transforms know what it holds; others as they are."""
    return x.as_subclass(Tensor) if isinstance(x, tv_tensors.TVTensor) else x
