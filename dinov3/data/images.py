"""The one reader of images: from the bytes of a file of any kind to 8-bit RGB.

Notable:
- JPEG goes through torchvision's decoder, which gives Pillow's pixels in less time; everything that it does not take,
  damaged files included, goes through Pillow, whose error is then the one that is reported. Of some damage that both
  read over, its library writes "Corrupt JPEG data" to the terminal.
- More than 8 bits are scaled by the range of their format, never clipped: 16 bits are divided by 65535, floats must lie
  within 0 to 1. Of 16-bit colour Pillow returns the upper byte, which differs from that by one level at most.
- Transparent pixels become white, as on a page, and a picture is turned as its EXIF data say; `ImageReading` changes
  both.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from dinov3.utils.messages import check_choice

logger = logging.getLogger("dinov3")

ALPHA = ("white", "drop")
EXIF = ("auto", "apply", "ignore")
#: Where Pillow sees an attack rather than a picture.
MAX_IMAGE_PIXELS = 178_956_970
UPRIGHT = 1  # the EXIF orientation of pictures that are stored as they are to be seen

_ORIENTATION_TAG = 0x0112
_JPEG = b"\xff\xd8\xff"
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_LARGEST_16_BITS = 65535
_PHOTOMETRIC_TAG, _WHITE_IS_ZERO = 262, 0
# By orientation: the axes to mirror, after rows and columns were exchanged for those from 5 on.
_MIRRORED_AXES = {1: (), 2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}
_WAY_OUT = (
    "If you trust the file, raise the limit: train.max_image_pixels=N in a training, --max-image-pixels N of a "
    "command, :max_image_pixels=N in a dataset string"
)


class BadImageError(RuntimeError):
    """An image that cannot be read or decoded; the message names the file, or dataset, index and file."""

    def __init__(self, message: str) -> None:
        if message.startswith(f"Caught {type(self).__name__} in "):
            # From a worker of a loader: it sends its whole traceback as text, in which nobody finds the message.
            message = message.rpartition(f"{type(self).__name__}: ")[2].rstrip()
        super().__init__(message)


@dataclass(frozen=True)
class ImageReading:
    """How images are read.

    Attributes:
        alpha: `white` puts transparent pictures on white; `drop` takes the colours that lie under the transparency.
        exif: `apply` turns and mirrors a picture as its EXIF data say; `ignore` leaves it as it is stored; `auto`
            applies, except in datasets whose published figures were measured without (`is_benchmark`).
        max_image_pixels: width x height of the largest image that is read.
        as_array: datasets return uint8 arrays [height, width, 3] instead of PIL images, which saves two copies.

    Raises:
        ValueError: an attribute is not as described.
    """

    alpha: str = "white"
    exif: str = "auto"
    max_image_pixels: int = MAX_IMAGE_PIXELS
    as_array: bool = False

    def __post_init__(self) -> None:
        check_choice("alpha", self.alpha, ALPHA)
        check_choice("exif", self.exif, EXIF)
        if self.max_image_pixels < 1:
            raise ValueError(f"max_image_pixels={self.max_image_pixels}: expected at least 1")


DEFAULT_READING = ImageReading()


def read_image(data: bytes, reading: ImageReading = DEFAULT_READING) -> Image.Image:
    """Decode the bytes of an image file to a PIL image of mode RGB; see `read_pixels`."""
    image = _decode(data, reading)
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def read_pixels(data: bytes, reading: ImageReading = DEFAULT_READING) -> np.ndarray[Any, Any]:
    """Decode the bytes of an image file.

    Args:
        data: of any format that Pillow reads; the first page if there are several.
        reading: what is done about transparency, rotation and size.

    Returns:
        uint8 [height, width, 3], writable.

    Raises:
        ValueError: more pixels than allowed, or numbers whose range says nothing of brightness.
        Exception: of any kind, from Pillow, for damaged files.
    """
    image = _decode(data, reading)
    return image if isinstance(image, np.ndarray) else np.array(image)


def read_image_file(path: str | os.PathLike[str], reading: ImageReading = DEFAULT_READING) -> Image.Image:
    """Decode an image file to a PIL image of mode RGB.

    Raises:
        BadImageError: it cannot be read, for whatever reason; the message names it.
    """
    try:
        return read_image(Path(path).read_bytes(), reading)
    except Exception as error:  # Pillow lets through whatever its plugins stumble over
        raise BadImageError(f"{path} cannot be read as an image: {type(error).__name__}: {error}") from error


def read_stored(data: bytes) -> Image.Image:
    """Decode the bytes of a map of labels or depths to a PIL image in its stored mode, with its raw values.

    Its size is limited only by Pillow, whose limit grows with that of the photos that were read before.
    """
    image = open_image(data, None)
    image.load()  # now, while the caller can still name a broken file
    return image


def open_image(data: bytes, max_image_pixels: int | None) -> Image.Image:
    """Open the bytes of an image file with Pillow, which reads only the header.

    Args:
        data: of any format that Pillow reads.
        max_image_pixels: width x height of the largest image. None: the limit of Pillow.

    Raises:
        ValueError: more pixels than that.
        UnidentifiedImageError: of no known format; other errors of Pillow for damaged headers.
    """
    limit_of_pillow = Image.MAX_IMAGE_PIXELS  # for the whole process; an error follows above twice this number
    if max_image_pixels is not None and limit_of_pillow is not None and max_image_pixels > 2 * limit_of_pillow:
        Image.MAX_IMAGE_PIXELS = max_image_pixels
    try:
        image = Image.open(BytesIO(data))
    except UnidentifiedImageError:  # its message shows the address of the bytes
        beginning = f", beginning with {data[:8]!r}" if data else ""
        raise UnidentifiedImageError(f"cannot identify image file ({len(data)} bytes{beginning})") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error} {_WAY_OUT}") from None
    if max_image_pixels is not None and image.width * image.height > max_image_pixels:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, more than the limit of {max_image_pixels}. {_WAY_OUT}"
        )
    if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
        _warn_of_pages()
    return image


def to_rgb(image: Image.Image, reading: ImageReading = DEFAULT_READING) -> Image.Image:
    """Convert a PIL image of any mode to RGB as `read_image` does, EXIF rotation included; metadata are dropped."""
    image.load()  # First, because Pillow turns TIFF images itself while it loads them.
    orientation = UPRIGHT if reading.exif == "ignore" else orientation_of(image)
    white_is_zero = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO
    if image.mode in _DEEP_MODES:
        rgb = _to_8_bits(image, alpha=reading.alpha, white_is_zero=white_is_zero).convert("RGB")
    else:
        rgb = _flatten(image, reading.alpha)
    if orientation != UPRIGHT:
        return Image.fromarray(turn_upright(np.asarray(rgb), orientation))
    rgb.info = {}  # It is as it should be: nothing may turn it once more.
    return rgb


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of a PIL image, 1 to 8; 1, upright, if it has none or one that is damaged."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, UPRIGHT)
    except Exception:  # of any kind; the pixels are sound all the same
        return UPRIGHT
    return orientation if orientation in _MIRRORED_AXES else UPRIGHT


def turn_upright(pixels: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """Turn and mirror an array [height, width, ...] as an EXIF orientation says."""
    exchanged = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    return np.ascontiguousarray(np.flip(exchanged, _MIRRORED_AXES[orientation]))


def orientation_of_file(data: bytes) -> int:
    """Return the EXIF orientation in the bytes of an image file, see `orientation_of`."""
    return orientation_of(open_image(data, None))


def _decode(data: bytes, reading: ImageReading) -> Image.Image | np.ndarray[Any, Any]:
    image = open_image(data, reading.max_image_pixels)
    if data.startswith(_JPEG) and image.mode in ("RGB", "L"):
        pixels = _decode_jpeg(data, image.size)
        if pixels is not None:
            return pixels if reading.exif == "ignore" else turn_upright(pixels, orientation_of(image))
    return to_rgb(image, reading)


def _decode_jpeg(data: bytes, size: tuple[int, int]) -> np.ndarray[Any, Any] | None:
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        # A copy, because a tensor over immutable bytes would warn.
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, AttributeError):  # damaged, of a rare kind, or torchvision was built without its decoders
        return None
    array = pixels.permute(1, 2, 0).numpy()
    return array if array.shape[1::-1] == size else None


def _flatten(image: Image.Image, alpha: str) -> Image.Image:
    if alpha == "drop" or not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() != (255, 255):
        rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return rgba.convert("RGB")


def _to_8_bits(image: Image.Image, *, alpha: str, white_is_zero: bool) -> Image.Image:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # also with NaN
            raise ValueError(
                f"its pixels are floating-point numbers from {low:g} to {high:g}, but only 0 (black) to 1 (white) have "
                "a known brightness: rescale them, or save the image with 8 or 16 bits per pixel"
            )
        levels = np.rint(values * np.float32(255)).astype(np.uint8)
    else:
        if low < 0 or high > _LARGEST_16_BITS:
            raise ValueError(
                f"its pixels are integers from {low} to {high}, but only 0 (black) to {_LARGEST_16_BITS} (white, 16 "
                "bits) have a known brightness: rescale them, or save the image with 8 or 16 bits per pixel"
            )
        levels = ((values.astype(np.uint32) * 255 + _LARGEST_16_BITS // 2) // _LARGEST_16_BITS).astype(np.uint8)
    if white_is_zero:  # Pillow inverts such TIFF images only if they have 8 bits or fewer.
        levels = 255 - levels
    transparent = image.info.get("transparency")
    if transparent is not None and alpha == "white":
        levels[values == transparent] = 255
    return Image.fromarray(levels)


@functools.cache
def _warn_of_pages() -> None:
    logger.warning("some TIFF files have several pages: only the first page of each is read")
