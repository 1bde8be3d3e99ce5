"""The base of all datasets: a concrete one says where bytes and targets lie, this one decodes and transforms them."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from torchvision.datasets import VisionDataset

from dinov3.data.datasets.decoders import Decoder, ImageDataDecoder, TargetDecoder
from dinov3.data.images import DEFAULT_READING, ImageReading
from dinov3.data.images import BadImageError as BadImageError

ON_BAD_IMAGE = ("raise", "skip")
NO_LABEL = -1  # in an array of class indices


class Transforms(TypedDict, total=False):
    """The arguments of all datasets that say what is done to a sample.

    Attributes:
        transforms: applied to (image, target), instead of the other two.
        transform: applied to the PIL image.
        target_transform: applied to the decoded target.
    """

    transforms: Callable[[Any, Any], Any] | None
    transform: Callable[[Any], Any] | None
    target_transform: Callable[[Any], Any] | None


class ExtendedVisionDataset(VisionDataset):
    """A torchvision dataset in two halves: reading (`get_image_data`, `get_target`) and decoding.

    A concrete dataset implements `get_image_relpath`, `get_target` and `__len__`, and `get_image_data` if its images
    are not files of their own.

    Args:
        image_decoder: makes the decoder of what `get_image_data` returns.
        target_decoder: makes the decoder of what `get_target` returns.
        *args, **kwargs: `root` and `Transforms`, as of `torchvision.datasets.VisionDataset`.

    Attributes:
        has_maps: whether targets are maps of labels or depths.
        is_benchmark: published figures were measured on these images as they are stored, so that a rotation in EXIF
            data is ignored unless `read_images` says otherwise.
        reading: how images are read; changed by `read_images`.
    """

    has_maps = False
    is_benchmark = False

    def __init__(
        self,
        image_decoder: Callable[[Any], Decoder] = ImageDataDecoder,
        target_decoder: Callable[[Any], Decoder] = TargetDecoder,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.image_decoder = image_decoder
        self.target_decoder = target_decoder
        ExtendedVisionDataset.read_images(self, DEFAULT_READING)

    def read_images(self, reading: ImageReading) -> None:
        """Set how images are read from now on; a decoder other than `ImageDataDecoder` does not notice."""
        if reading.exif == "auto":
            reading = dataclasses.replace(reading, exif="ignore" if self.is_benchmark else "apply")
        self.reading = reading

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image of sample `index`."""
        return Path(self.root, self.get_image_relpath(index)).read_bytes()

    def get_image_relpath(self, index: int) -> str:
        """Return the path of the image of sample `index`, relative to the root."""
        raise NotImplementedError

    def get_target(self, index: int) -> Any:
        """Return the target of sample `index`, before decoding and transforms."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def load_image(self, index: int) -> Any:
        """Read and decode the image of sample `index`.

        Raises:
            BadImageError: it cannot be read or decoded.
        """
        try:
            decoder = self.image_decoder
            if decoder is ImageDataDecoder:
                decoder = partial(ImageDataDecoder, reading=self.reading)
            return decoder(self.get_image_data(index)).decode()
        except BadImageError:
            raise
        except Exception as error:
            raise BadImageError(
                f"{type(self).__name__}: cannot read image {index}, {self._location(index)}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def load_target(self, index: int) -> Any:
        """Read and decode the target of sample `index`."""
        return self.target_decoder(self.get_target(index)).decode()

    def load_sample(self, index: int) -> tuple[Any, Any]:
        """Read and decode image and target of sample `index`, without the transforms."""
        return self.load_image(index), self.load_target(index)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{type(self).__name__}: index {index} is out of range for {len(self)} samples")
        image, target = self.load_sample(index % len(self))
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def _location(self, index: int) -> str:
        return os.path.join(str(self.root), self.get_image_relpath(index))


def all_or_no_labels(labels: np.ndarray, dataset: str, name_of: Callable[[int], str]) -> np.ndarray | None:
    """Return `labels`, or None if all of them are `NO_LABEL`.

    Raises:
        ValueError: only some of them are; the message names the first such sample by `name_of(index)`.
    """
    missing = np.flatnonzero(labels == NO_LABEL)
    if len(missing) == len(labels):
        return None
    if len(missing):
        raise ValueError(
            f"{dataset}: {len(missing)} of {len(labels)} samples have no label, the first is {name_of(int(missing[0]))}"
        )
    return labels
