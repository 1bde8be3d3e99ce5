"""Decoders: from what a dataset stores to what its transforms take."""

from __future__ import annotations

from typing import Any

from PIL import Image

from dinov3.data.images import DEFAULT_READING, ImageReading, read_image, read_pixels, read_stored


class Decoder:
    """Holds one encoded value; `decode` returns the decoded one."""

    def decode(self) -> Any:
        raise NotImplementedError


class ImageDataDecoder(Decoder):
    """Decodes the bytes of an image to a PIL image of mode RGB, or an array, see `ImageReading.as_array`."""

    def __init__(self, image_data: bytes, reading: ImageReading = DEFAULT_READING) -> None:
        self.image_data = image_data
        self.reading = reading

    def decode(self) -> Any:
        return (read_pixels if self.reading.as_array else read_image)(self.image_data, self.reading)


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
        return read_stored(self.image_data)
