"""Images with maps of depths in two folders: metres in every case, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3.data import make_dataset
from dinov3.data.datasets import BadImageError, DepthFolder
from dinov3.data.datasets.strings import DatasetStringError

MILLIMETRES = np.array([[0, 500, 1000], [65_535, 40_000, 1]], np.uint16)
METRES = np.array([[0, np.nan, 1.5], [np.inf, -np.inf, 0.25]])


def put(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values) if path.suffix == ".npy" else Image.fromarray(values).save(path, "PNG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image with a map in millimetres, and one with a map in metres."""
    for name in ("a.jpg", "sub/b.png"):
        put(tmp_path / "images" / name, np.zeros((2, 3, 3), np.uint8))
    put(tmp_path / "depth/a.png", MILLIMETRES)
    put(tmp_path / "depth/sub/b.npy", METRES)
    return tmp_path


def folder(root: Path, **kwargs: Any) -> DepthFolder:
    return DepthFolder(root=str(root), **kwargs)


def test_maps_are_png_or_npy_of_the_images_path(root: Path) -> None:
    dataset = folder(root)
    assert dataset.image_paths == ["images/a.jpg", "images/sub/b.png"]
    assert dataset.target_paths == ["depth/a.png", "depth/sub/b.npy"]


def test_png_values_over_the_scale_are_metres(root: Path) -> None:
    image, depth = folder(root)[0]
    assert image.mode == "RGB" and depth.dtype == np.float32 and depth.shape == (2, 3)
    np.testing.assert_allclose(depth, [[0, 0.5, 1], [65.535, 40, 0.001]], rtol=1e-6)
    scaled = make_dataset(dataset_str=f"DepthFolder:root={root}:scale=256.0")[0][1]
    np.testing.assert_allclose(scaled, MILLIMETRES / 256, rtol=1e-6)


def test_npy_values_are_metres_whatever_the_scale_and_no_measurement_is_zero(root: Path) -> None:
    depth = folder(root, scale=256)[1][1]
    assert depth.dtype == np.float32 and depth.tolist() == [[0, 0, 1.5], [0, 0, 0.25]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4"])
def test_npy_files_may_hold_any_floats(dtype: Any, root: Path) -> None:
    put(root / "depth/sub/b.npy", METRES.astype(dtype))
    assert folder(root)[1][1].tolist() == [[0, 0, 1.5], [0, 0, 0.25]]


def test_a_map_without_any_measurement_is_delivered(root: Path) -> None:
    put(root / "depth/a.png", MILLIMETRES * 0)
    assert not folder(root)[0][1].any()


def test_it_says_that_its_maps_are_in_metres() -> None:
    assert DepthFolder.depth_in_metres is True


def test_splits_and_other_folders_can_be_named(root: Path) -> None:
    (root / "images").rename(root / "rgb")
    (root / "depth").rename(root / "maps")
    dataset = make_dataset(dataset_str=f"DepthFolder:root={root}:split=sub:images=rgb:depth=maps")
    assert dataset.target_paths == ["maps/sub/b.npy"]


def test_it_can_be_pickled(root: Path) -> None:
    copy = pickle.loads(pickle.dumps(folder(root, scale=500)))
    assert copy[0][1][0].tolist() == [0, 1, 2]


def test_transforms_see_the_map(root: Path) -> None:
    dataset = make_dataset(dataset_str=f"DepthFolder:root={root}", target_transform=lambda depth: float(depth.max()))
    assert dataset[1][1] == 1.5


# What is refused


def test_images_without_map_and_maps_without_image_are_named(root: Path) -> None:
    (root / "images/a.jpg").rename(root / "images/c.jpg")
    with pytest.raises(ValueError) as info:
        folder(root)
    assert f"1 of 2 images in {root}/images have no depth map: c.jpg" in str(info.value)
    assert f"(expected c.png or c.npy in {root}/depth)" in str(info.value)
    assert f"1 of 2 depth maps in {root}/depth have no image: a.png" in str(info.value)


def test_two_maps_of_one_image_are_an_error(root: Path) -> None:
    put(root / "depth/a.npy", METRES)
    with pytest.raises(ValueError, match=rf"a\.npy, a\.png in {root}/depth differ only in their extensions"):
        folder(root)


def test_a_missing_folder_is_named(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"DepthFolder: there is no directory {root}/maps; .* depth, images"):
        folder(root, depth="maps")


@pytest.mark.parametrize("scale", [0, -1000, float("nan"), float("inf")])
def test_the_scale_must_be_positive(scale: float, root: Path) -> None:
    with pytest.raises(ValueError, match=f"scale={scale}: expected a positive number"):
        folder(root, scale=scale)


@pytest.mark.parametrize("scale", ["0", "-1", "mm", "", "nan", "1e999", "1_000"])
def test_a_scale_that_is_no_positive_number_is_an_error_of_the_string(scale: str) -> None:
    with pytest.raises(DatasetStringError, match=f"scale='{scale}' must be a positive number"):
        make_dataset(dataset_str=f"DepthFolder:root=/a:scale={scale}")


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("a.png", MILLIMETRES.astype(np.uint8), "grey PNG of 16 bits.* scale=1000 .* mode L"),
        ("a.png", np.zeros((2, 3, 3), np.uint8), "grey PNG of 16 bits.* mode RGB"),
        ("sub/b.npy", MILLIMETRES, r"expected floats \[height, width\] in metres, found uint16 \[2, 3\]"),
        ("sub/b.npy", METRES[None], r"expected floats .* found float64 \[1, 2, 3\]"),
        ("sub/b.npy", np.array([[1, -0.5, np.nan], [-2, 1, 1]]), "2 negative depths, down to -2 m"),
        ("sub/b.npy", np.array([["a"]], object), "allow_pickle"),
    ],
)
def test_a_map_that_holds_no_depths_is_named(name: str, values: np.ndarray, problem: str, root: Path) -> None:
    (root / "depth" / name).unlink()
    put(root / "depth" / name, values)
    with pytest.raises(BadImageError, match=rf"DepthFolder: cannot read target \d, {root}/depth/{name}: .*{problem}"):
        list(folder(root))


@pytest.mark.parametrize("name", ["a.png", "sub/b.npy"])
def test_a_map_of_another_size_is_an_error_that_names_both(name: str, root: Path) -> None:
    values = np.ones((2, 4), np.uint16 if name.endswith("png") else np.float32)
    put(root / "depth" / name, values)
    with pytest.raises(BadImageError, match=rf"{root}/images/.* has 3 x 2 .*, but {root}/depth/{name} has 4 x 2"):
        list(folder(root))


@pytest.mark.parametrize("name", ["a.png", "sub/b.npy"])
def test_a_truncated_map_is_named(name: str, root: Path) -> None:
    path = root / "depth" / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(BadImageError, match=rf"cannot read target \d, {path}"):
        list(folder(root))


@pytest.mark.parametrize("index", [0, 1], ids=["png", "npy"])
def test_a_map_is_turned_with_its_photo(root: Path, index: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: the size does not tell
    before = folder(root)[index][1]
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(root / folder(root).image_paths[index], exif=exif)
    after = folder(root)[index][1]
    assert after.dtype == np.float32 and np.array_equal(after, before[::-1, ::-1])
