"""From what a dataset stores to what a transform takes: encoded bytes to PIL images, targets to targets."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from PIL import Image, UnidentifiedImageError


class Decoder:
    """Holds one encoded value; `decode` gives the decoded one."""

    def decode(self) -> Any:
        raise NotImplementedError


class ImageDataDecoder(Decoder):
    """Encoded bytes of an image, decoded to a PIL image of mode RGB.

    Alpha is dropped, palettes and gray values are expanded, EXIF rotation is ignored.
    """

    def __init__(self, image_data: bytes) -> None:
        self.image_data = image_data

    def decode(self) -> Image.Image:
        return _open(self.image_data).convert(mode="RGB")


class TargetDecoder(Decoder):
    """A target that needs no decoding."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def decode(self) -> Any:
        return self.target


class DenseTargetDecoder(Decoder):
    """Encoded bytes of a map of labels or depths, decoded to a PIL image in its stored mode (`L`, `P`, `I;16`, ...)."""

    def __init__(self, image_data: bytes) -> None:
        self.image_data = image_data

    def decode(self) -> Image.Image:
        image = _open(self.image_data)
        image.load()  # now, while the caller can still say which file is broken
        return image


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(data))
    except UnidentifiedImageError:  # which names the object in memory
        beginning = f", beginning with {data[:8]!r}" if data else ""
        raise UnidentifiedImageError(f"cannot identify image file ({len(data)} bytes{beginning})") from None
