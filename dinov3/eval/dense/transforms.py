"""What the transforms of depth and segmentation share: sizes, and resizing an image together with its map of labels.

Each transform takes and returns (image, label). A label is what a dataset delivers, or a tensor once it was converted.
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

BILINEAR = v2.InterpolationMode.BILINEAR
NEAREST = v2.InterpolationMode.NEAREST


def size_of(x: Image.Image | np.ndarray | Tensor) -> tuple[int, int]:
    """Height and width of a PIL image, or of an array or tensor [..., H, W]."""
    if isinstance(x, Image.Image):
        return x.height, x.width
    return int(x.shape[-2]), int(x.shape[-1])


class EqualSizes:
    """Hands on an image and its label if they have one size; what is cut from one place must be of one place.

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
    """Resize the image and, if asked, its label.

    Args:
        size: (height, width), or the shorter side. With one number the longer side is truncated.
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
        self.size = [size] if isinstance(size, int) else [int(side) for side in size]
        self.image_interpolation = image_interpolation
        self.label_interpolation = label_interpolation
        self.resize_label = resize_label

    def __call__(self, img: Any, label: Any) -> tuple[Any, Any]:
        img = resize_image(img, self.size, self.image_interpolation)
        if self.resize_label:
            label = resize_label(label, self.size, self.label_interpolation)
        return img, label


def resize_image(img: Image.Image | Tensor, size: Sequence[int], interpolation: v2.InterpolationMode) -> Any:
    """A PIL image or a tensor [3, H, W] at `size` (height, width) or (shorter side,), with antialiasing."""
    return v2.functional.resize(img, list(size), interpolation=interpolation, antialias=True)


def resize_label(label: Any, size: Sequence[int], interpolation: v2.InterpolationMode) -> Any:
    """A PIL image, a tensor [..., H, W] or an array [H, W] at `size`, of its own kind.

    "Nearest" of an array is that of PIL, the pixel that holds the centre, as it goes with a resized PIL image.
    """
    if isinstance(label, np.ndarray):
        exact = v2.InterpolationMode.NEAREST_EXACT if interpolation is NEAREST else interpolation
        return resize_label(label_to_tensor(label, "label"), size, exact)[0].numpy()
    return v2.functional.resize(label, list(size), interpolation=interpolation, antialias=True)


def label_to_tensor(label: Any, what: str) -> Tensor:
    """A single-channel label map as a tensor.

    Args:
        label: a PIL image of mode L, P, 1, I, I;16 or F, or an array or tensor [H, W] or [1, H, W].
        what: what it is called in errors, e.g. "depth map".

    Returns:
        [1, H, W]: uint8 of 8-bit images, uint16 of 16-bit ones, int32 or float32 of the others. Arrays keep their
        dtype, but floating-point ones become float32.

    Raises:
        ValueError: it has several channels.
        TypeError: it is something else.
    """
    if isinstance(label, Image.Image):
        if len(label.getbands()) != 1:
            raise ValueError(f"a {what} has one channel, got a PIL image of mode {label.mode!r}")
        array = np.asarray(label)
    elif isinstance(label, Tensor):
        array = label.detach().cpu().numpy()
    elif isinstance(label, np.ndarray):
        array = label
    else:
        raise TypeError(f"a {what} is a PIL image, a NumPy array or a tensor, got {type(label).__name__}")
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2:
        raise ValueError(f"a {what} has shape [H, W] or [1, H, W], got {tuple(array.shape)}")
    dtype: Any = {"b": np.uint8, "f": np.float32}.get(array.dtype.kind, array.dtype.newbyteorder("="))
    # A copy: PIL's buffer is read-only, and what a dataset keeps in memory must not change with the sample.
    return torch.from_numpy(np.array(array, dtype=dtype))[None]


def plain(x: Tensor) -> Tensor:
    """A tensor without the class that tells torchvision's transforms what it holds."""
    return x.as_subclass(Tensor) if isinstance(x, tv_tensors.TVTensor) else x
