"""Decoders: from what a dataset stores to what its transforms take."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from PIL import Image, UnidentifiedImageError


class Decoder:
    """Holds one encoded value; `decode` returns the decoded one."""

    def decode(self) -> Any:
        raise NotImplementedError


class ImageDataDecoder(Decoder):
    """Decodes the bytes of an image to a PIL image of mode RGB.

    Alpha is dropped, palettes and gray values are expanded, EXIF rotation is ignored.
    """

    def __init__(self, image_data: bytes) -> None:
        self.image_data = image_data

    def decode(self) -> Image.Image:
        return _open(self.image_data).convert(mode="RGB")


class TargetDecoder(Decoder):
    """Returns a target as it is."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def decode(self) -> Any:
        return self.target


class DenseTargetDecoder(Decoder):
    """Decodes the bytes of a map of labels or depths to a PIL image in its stored mode (`L`, `P`, `I;16`, ...)."""

    def __init__(self, image_data: bytes) -> None:
        self.image_data = image_data

    def decode(self) -> Image.Image:
        image = _open(self.image_data)
        image.load()  # now, while the caller can still name a broken file
        return image


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(data))
    except UnidentifiedImageError:  # its message shows the address of the bytes
        beginning = f", beginning with {data[:8]!r}" if data else ""
        raise UnidentifiedImageError(f"cannot identify image file ({len(data)} bytes{beginning})") from None
