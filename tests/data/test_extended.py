"""What all datasets share: reading, decoding, transforms, and errors that name the sample."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3.data.datasets import BadImageError, ExtendedVisionDataset, ImageFolder
from dinov3.data.datasets.decoders import DenseTargetDecoder, ImageDataDecoder, TargetDecoder
from dinov3.data.images import ImageReading


def encode(image: Image.Image, format: str = "PNG", **kwargs: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


class InMemory(ExtendedVisionDataset):
    """Encoded images, with their index as target."""

    def __init__(self, images: list[bytes], **kwargs: Any) -> None:
        super().__init__(root="/somewhere", **kwargs)
        self.images = images

    def get_image_data(self, index: int) -> bytes:
        return self.images[index]

    def get_image_relpath(self, index: int) -> str:
        return f"sub/{index}.png"

    def get_target(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return len(self.images)


GRAY = encode(Image.new("L", (5, 4), 77))


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("L", (2, 2), 9), (9, 9, 9)),
        (Image.new("RGBA", (2, 2), (1, 2, 3, 0)), (255, 255, 255)),
        (Image.new("RGB", (2, 2), (4, 5, 6)).quantize(2), (4, 5, 6)),
    ],
    ids=["gray", "alpha", "palette"],
)
def test_images_are_decoded_to_rgb(image: Image.Image, pixel: tuple[int, int, int]) -> None:
    decoded = ImageDataDecoder(encode(image)).decode()
    assert decoded.mode == "RGB" and decoded.getpixel((0, 0)) == pixel


def lying() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    return encode(Image.new("RGBA", (5, 3)), exif=exif)


class Benchmark(InMemory):
    is_benchmark = True


@pytest.mark.parametrize(
    ("dataset", "exif", "size"),
    [
        (InMemory, "auto", (3, 5)),
        (InMemory, "ignore", (5, 3)),
        (Benchmark, "auto", (5, 3)),
        (Benchmark, "apply", (3, 5)),
    ],
)
def test_exif_rotation_is_applied_except_to_published_benchmarks(
    dataset: type[InMemory], exif: str, size: tuple[int, int]
) -> None:
    images = dataset([lying()])
    images.read_images(ImageReading(exif=exif))
    assert images[0][0].size == size
    assert exif != "auto" or dataset([lying()])[0][0].size == size


def test_images_are_read_as_they_are_asked_for() -> None:
    images = InMemory([lying()])
    assert images[0][0].getpixel((0, 0)) == (255, 255, 255)
    images.read_images(ImageReading(alpha="drop", as_array=True))
    pixels = images[0][0]
    assert isinstance(pixels, np.ndarray) and pixels.shape == (5, 3, 3) and not pixels.any()
    images.read_images(ImageReading(max_image_pixels=14))
    with pytest.raises(BadImageError, match=r"image 0, /somewhere/sub/0\.png: .*more than the limit of 14"):
        images[0]


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        (np.array([[0, 255]], dtype=np.uint8), "L"),
        (np.array([[0, 40000]], dtype=np.uint16), "I;16"),
    ],
)
def test_dense_targets_keep_their_mode_and_values(values: np.ndarray, mode: str) -> None:
    decoded = DenseTargetDecoder(encode(Image.fromarray(values))).decode()
    assert decoded.mode == mode
    assert np.array_equal(np.asarray(decoded), values)


def test_truncated_dense_target_fails_when_it_is_decoded() -> None:
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8)))
    with pytest.raises(OSError):
        DenseTargetDecoder(data[: len(data) // 2]).decode()


def test_targets_are_given_back_as_they_are() -> None:
    target = object()
    assert TargetDecoder(target).decode() is target


def test_item_is_the_image_and_its_target() -> None:
    image, target = InMemory([GRAY, GRAY])[1]
    assert image.mode == "RGB" and image.size == (5, 4) and target == 1


def test_transform_and_target_transform_are_applied_and_reachable() -> None:
    dataset = InMemory([GRAY], transform=lambda image: image.size, target_transform=lambda target: target + 10)
    assert dataset[0] == ((5, 4), 10)
    assert dataset.transforms.target_transform(1) == 11


def test_transforms_get_both() -> None:
    assert InMemory([GRAY], transforms=lambda image, target: (target, image.size))[0] == (0, (5, 4))


def test_transforms_together_with_transform_is_refused() -> None:
    with pytest.raises(ValueError, match="transforms"):
        InMemory([GRAY], transforms=lambda image, target: (image, target), transform=lambda image: image)


def test_root_is_expanded() -> None:
    class Home(InMemory):
        def __init__(self) -> None:
            ExtendedVisionDataset.__init__(self, root="~/images")

    assert Home().root == str(Path.home() / "images")


@pytest.mark.parametrize("data", [b"not an image", b"", encode(Image.new("RGB", (400, 400)))[:300]])
def test_bad_image_names_dataset_index_and_file_and_keeps_the_cause(data: bytes) -> None:
    with pytest.raises(BadImageError, match="InMemory: cannot read image 1, /somewhere/sub/1.png: ") as info:
        InMemory([GRAY, data])[1]
    assert isinstance(info.value, RuntimeError) and isinstance(info.value.__cause__, OSError)
    assert "object at 0x" not in str(info.value)


def test_deleted_file_is_a_bad_image_too(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(GRAY)
    dataset = ImageFolder(root=str(tmp_path))
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImageError, match=r"image 0, .*a\.png: FileNotFoundError"):
        dataset[0]


def test_negative_indices_count_from_the_end() -> None:
    dataset = InMemory([GRAY, GRAY, GRAY])
    assert dataset[-1][1] == 2 and dataset[np.int64(-3)][1] == 0


@pytest.mark.parametrize("index", [2, -3])
def test_index_out_of_range_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError, match=f"InMemory: index {index} is out of range for 2 samples"):
        InMemory([GRAY, GRAY])[index]


def test_iteration_ends() -> None:
    assert len(list(InMemory([GRAY, GRAY]))) == 2
