"""The one reader of images: what every kind of file looks like once it is read, and what is refused."""

from __future__ import annotations

import struct
import warnings
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from dinov3.data import images
from dinov3.data.images import BadImageError, ImageReading, read_image, read_image_file, read_pixels, to_rgb

ORIENTATION = 0x0112
RAMP = np.linspace(0, 65535, 12).reshape(3, 4).round()
LEVELS = np.rint(RAMP / 257)  # 65535 / 255


def encode(image: Image.Image, format: str = "PNG", **kwargs: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


def smooth(mode: str = "RGB", size: tuple[int, int] = (61, 45)) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def gray_png(values: np.ndarray, **kwargs: Any) -> bytes:
    return encode(Image.fromarray(values), **kwargs)


@pytest.mark.parametrize(
    ("stored", "format"),
    [
        (RAMP.astype("<u2"), "PNG"),
        (RAMP.astype("<u2"), "TIFF"),
        (RAMP.astype(">u2"), "TIFF"),
        (RAMP.astype(np.int32), "TIFF"),
        ((RAMP / 65535).astype(np.float32), "TIFF"),
    ],
    ids=["png", "tiff", "big-endian tiff", "32-bit integers", "floats"],
)
def test_more_than_8_bits_are_scaled_by_their_range(stored: np.ndarray, format: str) -> None:
    pixels = read_pixels(encode(Image.fromarray(stored), format))
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 4, 3)
    assert np.array_equal(pixels, np.stack([LEVELS] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_pictures_of_16_bits_that_are_open_already(mode: str) -> None:
    picture = Image.frombytes(mode, (4, 3), RAMP.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    assert np.array_equal(np.asarray(to_rgb(picture))[..., 0], LEVELS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.array([[0.0, 1.5]], dtype=np.float32),
            r"floating-point numbers from 0 to 1.5, but only 0 .* to 1 .*: rescale",
        ),
        (np.array([[-0.1, 1]], dtype=np.float32), "from -0.1 to 1"),
        (np.array([[0.5, np.nan]], dtype=np.float32), "floating-point numbers"),
        (
            np.array([[0, 70000]], dtype=np.int32),
            r"integers from 0 to 70000, but only 0 .* to 65535 .*: rescale them, or",
        ),
        (np.array([[-1, 5]], dtype=np.int32), "integers from -1 to 5"),
    ],
    ids=["floats above 1", "negative floats", "NaN", "more than 16 bits", "negative integers"],
)
def test_numbers_without_a_known_brightness_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_image(encode(Image.fromarray(values), "TIFF"))


def test_tiff_whose_zero_is_white() -> None:
    data = encode(Image.fromarray(RAMP.astype("<u2")), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(read_pixels(data)[..., 0], 255 - LEVELS)


def deep_png(values: np.ndarray, transparent: int | None = None) -> bytes:
    """A PNG of 16 bits per channel, [H, W, channels], by hand: Pillow does not write them all."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = values.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    header += b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)  # each after the number of its filter
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [2, 3, 4], ids=["gray and alpha", "RGB", "RGB and alpha"])
def test_colour_and_alpha_of_16_bits_are_within_a_level(channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels)).astype(np.float64)
    alpha = values[..., -1:] / 65535 if channels != 3 else 1
    want = (values[..., : (channels - 1) | 1] * alpha + 65535 * (1 - alpha)) / 257
    assert np.abs(read_pixels(deep_png(values)) - want).max() <= 2 - (channels == 3)


def test_the_first_page_of_several_is_read_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    images._warn_of_pages.cache_clear()
    pages = [Image.new("L", (2, 2), level) for level in (7, 8)]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert (read_pixels(data) == 7).all() and (read_pixels(data) == 7).all()
    assert caplog.text.count("only the first page of each is read") == 1


def drawing(mode: str) -> bytes:
    """Half of the pixels a colour, the other half transparent, in PNG files of every kind that can say so."""
    alpha = Image.fromarray(np.repeat(np.array([[255, 0]], dtype=np.uint8), 2, axis=0))
    if mode in ("LA", "RGBA"):
        picture = Image.new(mode, (2, 2), 0)
        picture.putalpha(alpha)
        return encode(picture)
    if mode == "P":
        picture = Image.fromarray(np.array([[0, 1]] * 2, dtype=np.uint8)).convert("P")
        picture.putpalette([0, 0, 0, 9, 9, 9])
        return encode(picture, transparency=1)
    if mode == "P bytes":
        picture = Image.fromarray(np.array([[0, 1]] * 2, dtype=np.uint8)).convert("P")
        picture.putpalette([0, 0, 0, 9, 9, 9])
        return encode(picture, transparency=b"\xff\x00")
    if mode == "RGB":
        return encode(Image.fromarray(np.array([[[0] * 3, [9] * 3]] * 2, dtype=np.uint8)), transparency=(9, 9, 9))
    if mode == "I;16":
        return deep_png(np.array([[[0], [9]]] * 2), transparent=9)
    return encode(Image.fromarray(np.array([[0, 9]] * 2, dtype=np.uint8)), transparency=9)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "P bytes", "RGB", "L", "I;16"])
def test_transparent_pixels_are_white_unless_alpha_is_dropped(mode: str) -> None:
    data = drawing(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_pixels(data)[0, :, 0].tolist() == [0, 255]
        assert read_pixels(data, ImageReading(alpha="drop"))[0, :, 0].tolist()[0] == 0
    assert read_pixels(data, ImageReading(alpha="drop"))[0, 1, 0] < 10


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    assert read_image(encode(Image.new("RGBA", (1, 1), (100, 0, 200, 51)))).getpixel((0, 0)) == (224, 204, 244)


def test_opaque_pictures_keep_every_bit() -> None:
    picture = smooth()
    opaque = picture.copy()
    opaque.putalpha(255)
    assert np.array_equal(read_pixels(encode(opaque)), np.asarray(picture))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "RGB"])
def test_other_modes_are_those_of_pillow(mode: str) -> None:
    picture = Image.new("LAB", (4, 3), (99, 9, 9)) if mode == "LAB" else smooth(mode)
    assert np.array_equal(np.asarray(to_rgb(picture)), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("format", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("WEBP", "RGB")],
)
def test_exif_orientation(orientation: int, format: str, mode: str) -> None:
    data = encode(smooth(mode), format, exif=with_orientation(orientation))
    stored = Image.open(BytesIO(data)).convert("RGB")
    want = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    upright = read_image(data)
    assert np.array_equal(np.asarray(upright), np.asarray(want))
    assert np.array_equal(np.asarray(to_rgb(upright)), np.asarray(upright)), "turned twice"
    as_stored = read_image(data, ImageReading(exif="ignore"))
    assert np.array_equal(np.asarray(as_stored), np.asarray(stored))
    assert np.array_equal(np.asarray(to_rgb(as_stored)), np.asarray(as_stored)), "turned afterwards"


def test_pictures_of_16_bits_are_turned_too() -> None:
    data = gray_png(RAMP.astype("<u2"), exif=with_orientation(6))
    assert np.array_equal(read_pixels(data)[..., 0], np.rot90(LEVELS, -1))


def test_turned_tiff_is_turned_once() -> None:
    data = encode(Image.fromarray(LEVELS.astype(np.uint8)), "TIFF", tiffinfo={274: 6})
    assert np.array_equal(read_pixels(data)[..., 0], np.rot90(LEVELS, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_spoil_the_picture() -> None:
    data = encode(smooth(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert read_image(data).size == (61, 45)


JPEGS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True, "quality": 30},
    "restart markers": {"restart_marker_blocks": 3},
    "kept as RGB": {"keep_rgb": True},
}


def with_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(61, 45), (16, 16), (1, 1), (333, 2)])
def test_jpeg_has_the_pixels_of_pillow(kind: str, mode: str, size: tuple[int, int], monkeypatch: Any) -> None:
    data = encode(smooth(mode, size), "JPEG", **JPEGS[kind])
    pixels = read_pixels(data)
    assert np.array_equal(pixels, with_pillow(data)) and pixels.flags.writeable
    monkeypatch.setattr(images, "to_rgb", None)  # and it was not Pillow
    assert np.array_equal(np.asarray(read_image(data)), pixels)


def outcome(read: Any, data: bytes) -> Any:
    try:
        return read(data)
    except Exception as error:
        return type(error), str(error)


def damaged_jpegs() -> list[bytes]:
    rng = np.random.default_rng(0)
    files = []
    for options in JPEGS.values():
        data = encode(smooth(), "JPEG", **options)
        files += [data[:-2], data + b"rest", data[: len(data) // 2], data[:30], data[:3], data[:-2] + b"\xff\xff"]
        for _ in range(40):
            changed = bytearray(data)
            for position in rng.integers(2, len(data), rng.integers(1, 6)):
                changed[position] = rng.integers(0, 256)
            files.append(bytes(changed))
    return files


def test_damaged_jpeg_has_the_pixels_or_the_error_of_pillow() -> None:
    def pillow_only(data: bytes) -> np.ndarray:
        return np.asarray(to_rgb(images.open_image(data, None)))

    read = failed = 0
    for data in damaged_jpegs():
        ours, pillow = outcome(read_pixels, data), outcome(pillow_only, data)
        if isinstance(pillow, np.ndarray):
            read += 1
            assert isinstance(ours, np.ndarray) and np.array_equal(ours, pillow)
        else:
            failed += 1
            assert ours == pillow
    assert read > 50 and failed > 20


def test_too_many_pixels() -> None:
    data = encode(Image.new("L", (30, 20)))
    assert read_image(data, ImageReading(max_image_pixels=600)).size == (30, 20)
    with pytest.raises(ValueError, match=r"30 x 20 pixels, more than the limit of 599\. .*train.max_image_pixels=N"):
        read_image(data, ImageReading(max_image_pixels=599))


def test_the_limit_may_be_above_that_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encode(Image.new("L", (30, 20)))
    with pytest.raises(ValueError, match=r"600 pixels.*train.max_image_pixels=N"):
        read_image(data, ImageReading(max_image_pixels=200))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(data, ImageReading(max_image_pixels=600)).size == (30, 20)


@pytest.mark.parametrize(
    "error", [Image.DecompressionBombError, SyntaxError, ValueError, RuntimeError, struct.error, IndexError, OSError]
)
def test_whatever_pillow_raises_is_a_bad_image(error: type[Exception], tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "a.png").write_bytes(encode(Image.new("L", (3, 3))))

    def fail(*_: Any) -> None:
        raise error("what is wrong")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(BadImageError, match="a.png cannot be read as an image: .*: what is wrong"):
        read_image_file(tmp_path / "a.png")


@pytest.mark.parametrize("settings", [{"alpha": "black"}, {"exif": "yes"}, {"max_image_pixels": 0}])
def test_settings_that_do_not_exist(settings: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ImageReading(**settings)
