"""The base of all datasets: a concrete one says where bytes and targets lie, this one decodes and transforms them."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from typing import Any

from torchvision.datasets import VisionDataset

from dinov3.data.datasets.decoders import Decoder, ImageDataDecoder, TargetDecoder

ON_BAD_IMAGE = ("raise", "skip")


class BadImageError(RuntimeError):
    """An image that cannot be read or decoded; the message names dataset, index and file."""


class ExtendedVisionDataset(VisionDataset):
    """A torchvision dataset in two halves: reading (`get_image_data`, `get_target`) and decoding.

    A concrete dataset implements `get_image_data`, `get_image_relpath`, `get_target` and `__len__`.

    Args:
        image_decoder: makes the decoder of what `get_image_data` returns.
        target_decoder: makes the decoder of what `get_target` returns.
        *args, **kwargs: of `torchvision.datasets.VisionDataset`: `root` and either `transforms`, of (image, target), or
            `transform` and `target_transform`.
    """

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

    def get_image_data(self, index: int) -> bytes:
        """The encoded image of sample `index`."""
        raise NotImplementedError

    def get_image_relpath(self, index: int) -> str:
        """Path of the image of sample `index`, relative to the root."""
        raise NotImplementedError

    def get_target(self, index: int) -> Any:
        """The target of sample `index`, before decoding and transforms."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def load_image(self, index: int) -> Any:
        """The decoded image of sample `index`, without transforms.

        Raises:
            BadImageError: the image cannot be read or decoded.
        """
        try:
            return self.image_decoder(self.get_image_data(index)).decode()
        except BadImageError:
            raise
        except Exception as error:
            raise BadImageError(
                f"{type(self).__name__}: cannot read image {index}, {self._location(index)}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def load_target(self, index: int) -> Any:
        """The decoded target of sample `index`, without transforms."""
        return self.target_decoder(self.get_target(index)).decode()

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{type(self).__name__}: index {index} is out of range for {len(self)} samples")
        index %= len(self)
        image, target = self.load_image(index), self.load_target(index)
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def _location(self, index: int) -> str:
        return os.path.join(str(self.root), self.get_image_relpath(index))
