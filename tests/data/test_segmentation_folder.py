"""Images with maps of class indices in two folders: how they pair up, what is delivered, and what is refused."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3.data import make_dataset
from dinov3.data.datasets import BadImageError, SegmentationFolder
from dinov3.data.datasets.strings import DatasetStringError


def put(path: Path, values: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    if mode == "P":
        picture = Image.frombytes("P", picture.size, values.tobytes())
        picture.putpalette([200, 30, 30, 30, 200, 30, 30, 30, 200])
    picture.save(path, "PNG")


def photo(height: int = 4, width: int = 6) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def mask(*indices: int, height: int = 4, width: int = 6) -> np.ndarray:
    return np.resize(np.array(indices, np.uint8), (height, width))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two training images, one of them deeper, and one for validation."""
    for name in ("train/b.JPG", "train/deep/a.x.png", "val/c.png"):
        put(tmp_path / "images" / name, photo())
    for name in ("train/b.png", "train/deep/a.x.PNG", "val/c.png"):
        put(tmp_path / "labels" / name, mask(0, 2, 255))
    (tmp_path / "classes.txt").write_text("sky\nwet sand\nsea\n")
    return tmp_path


def folder(root: Path, **kwargs: str) -> SegmentationFolder:
    return SegmentationFolder(root=str(root), **kwargs)


# What is found and delivered


def test_a_mask_has_the_path_of_its_image_but_for_the_extension(root: Path) -> None:
    dataset = folder(root, split="train")
    assert dataset.image_paths == ["images/train/b.JPG", "images/train/deep/a.x.png"]
    assert dataset.target_paths == ["labels/train/b.png", "labels/train/deep/a.x.PNG"]


def test_without_a_split_all_of_both_folders_is_taken(root: Path) -> None:
    assert [Path(path).name for path in folder(root).image_paths] == ["b.JPG", "a.x.png", "c.png"]


def test_other_folders_can_be_named_and_splits_match_in_lower_case(root: Path) -> None:
    (root / "images").rename(root / "photos")
    (root / "labels").rename(root / "masks")
    dataset = make_dataset(dataset_str=f"SegmentationFolder:root={root}:split=VAL:images=photos:labels=masks/")
    assert dataset.target_paths == ["masks/val/c.png"] and np.asarray(dataset[0][1])[0, 1] == 2


def test_hidden_files_and_other_files_are_no_masks(root: Path) -> None:
    put(root / "labels/train/.x.png", mask(0))
    (root / "labels/train/notes.txt").write_text("nothing")
    assert len(folder(root, split="train")) == 2


def test_items_are_an_image_and_a_map_of_indices(root: Path) -> None:
    image, label = folder(root, split="train")[-1]
    assert image.mode == "RGB" and label.mode == "L" and image.size == label.size == (6, 4)
    assert np.array_equal(label, mask(0, 2, 255))


@pytest.mark.parametrize("kind", ["palette", "one bit", "16 bits"])
def test_indices_are_read_from_every_kind_of_mask(kind: str, root: Path) -> None:
    expected = mask(0, 1)
    path = root / "labels/val/c.png"
    if kind == "palette":
        put(path, expected, "P")
    else:
        put(path, expected.astype(bool if kind == "one bit" else np.uint16))
    label = folder(root, split="val")[0][1]
    assert label.mode == "L" and np.array_equal(label, expected)


def test_transforms_see_image_and_mask(root: Path) -> None:
    dataset = make_dataset(dataset_str=f"SegmentationFolder:root={root}", transforms=lambda image, mask: (mask, image))
    assert dataset[0][0].mode == "L" and dataset[0][1].mode == "RGB"


def test_class_names_are_the_lines_of_the_file(root: Path) -> None:
    assert folder(root).class_names == ["sky", "wet sand", "sea"]
    (root / "classes.txt").write_bytes("\ufeffHimmel\r\nWüste\r\n\r\n".encode())
    assert folder(root).class_names == ["Himmel", "Wüste"]


def test_without_the_file_there_are_no_names_and_any_index_is_allowed(root: Path) -> None:
    (root / "classes.txt").unlink()
    put(root / "labels/val/c.png", mask(0, 254, 255))
    dataset = folder(root, split="val")
    assert dataset.class_names is None and np.unique(dataset[0][1]).tolist() == [0, 254, 255]


def test_it_can_be_pickled(root: Path) -> None:
    copy = pickle.loads(pickle.dumps(folder(root, split="val")))
    assert copy.class_names == ["sky", "wet sand", "sea"] and np.array_equal(copy[0][1], mask(0, 2, 255))


# What is refused when it is opened


def test_a_missing_folder_or_split_is_named_with_what_there_is(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no directory {root}/images/test; {root}/images has .* train, val"):
        folder(root, split="test")
    with pytest.raises(FileNotFoundError, match=rf"no directory {root}/masks; {root} has .* images, labels"):
        folder(root, labels="masks")
    with pytest.raises(FileNotFoundError, match=rf"SegmentationFolder: root='{root}/no' is not a directory"):
        folder(root / "no")


def test_a_folder_without_images_is_named(root: Path) -> None:
    (root / "images/val/c.png").rename(root / "images/val/c.raw")
    with pytest.raises(FileNotFoundError, match=rf"no images in {root}/images/val: looked for .* jpg, jpeg"):
        folder(root, split="val")


def test_images_without_mask_and_masks_without_image_are_counted_and_named(root: Path) -> None:
    for number in range(5):
        put(root / f"images/val/more/{number}.jpg", photo())
    put(root / "labels/val/odd.png", mask(0))
    with pytest.raises(ValueError) as info:
        folder(root, split="val")
    assert str(info.value) == (
        f"SegmentationFolder: 5 of 6 images in {root}/images/val have no mask: "
        f"more/0.jpg, more/1.jpg, more/2.jpg and 2 more (expected more/0.png in {root}/labels/val); "
        f"1 of 2 masks in {root}/labels/val have no image: odd.png "
        f"(expected odd.jpg or another image in {root}/images/val)"
    )


def test_two_images_of_one_name_are_an_error(root: Path) -> None:
    put(root / "images/val/c.jpg", photo())
    with pytest.raises(ValueError, match=rf"c\.jpg, c\.png in {root}/images/val differ only in their extensions"):
        folder(root, split="val")


def test_images_and_masks_in_one_folder_are_an_error(root: Path) -> None:
    with pytest.raises(ValueError, match="both lie in 'images'"):
        folder(root, labels="images")


@pytest.mark.parametrize(
    ("content", "problem"),
    [("\n \n", "names 0 classes"), ("a\n\nb\n", "line 2 is empty"), ("a\n" * 256, "names 256 classes.* 1 to 255")],
)
def test_a_file_of_classes_that_names_none_or_too_many_is_an_error(content: str, problem: str, root: Path) -> None:
    (root / "classes.txt").write_text(content)
    with pytest.raises(ValueError, match=rf"{root}/classes\.txt.*{problem}"):
        folder(root)


def test_unknown_keys_are_an_error() -> None:
    with pytest.raises(DatasetStringError, match="did you mean 'labels'.*needs root and takes split, images, labels"):
        make_dataset(dataset_str="SegmentationFolder:root=/a:label=masks")


# What is refused when it is read


@pytest.mark.parametrize("with_transforms", [False, True])
def test_a_mask_of_another_size_is_an_error_that_names_both(with_transforms: bool, root: Path) -> None:
    put(root / "labels/val/c.png", mask(0, height=4, width=5))
    dataset = folder(root, split="val")
    if with_transforms:
        dataset.transforms = lambda image, label: (image, label)
    with pytest.raises(BadImageError, match=rf"{root}/images/val/c\.png has 6 x 4 .* {root}/labels/val/c\.png has 5 x"):
        dataset[0]


def test_swapped_sides_hint_at_exif_rotation(root: Path) -> None:
    put(root / "labels/val/c.png", mask(0, height=6, width=4))
    with pytest.raises(BadImageError, match=r"4 x 6: they must have the same size; a rotation .*EXIF.* \(exif=apply\)"):
        make_dataset(dataset_str=f"SegmentationFolder:root={root}:split=val:exif=ignore")[0]


@pytest.mark.parametrize("mode", [None, "P"])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("exif", "quarter_turns"), [("auto", -1), ("ignore", 0)])
def test_a_mask_is_turned_with_its_photo(
    root: Path, mode: str | None, joined: bool, exif: str, quarter_turns: int
) -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 6  # by a quarter clockwise
    levels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(levels).save(root / "images/val/c.png", exif=orientation)
    put(root / "labels/val/c.png", levels % 3, mode)
    text = f"SegmentationFolder:root={root}:split=val:exif={exif}"
    image, label = make_dataset(dataset_str="+".join([text] * (1 + joined)))[joined]
    assert np.array_equal(np.asarray(image)[..., 0], np.rot90(levels, quarter_turns))
    assert np.array_equal(np.asarray(label), np.rot90(levels % 3, quarter_turns))


def test_a_mask_that_was_drawn_on_the_turned_photo_stays_as_it_is(root: Path) -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 8
    Image.fromarray(photo()).save(root / "images/val/c.png", exif=orientation)
    put(root / "labels/val/c.png", mask(0, 1, 2, height=6, width=4))
    image, label = folder(root, split="val")[0]
    assert image.size == (4, 6) and np.array_equal(np.asarray(label), mask(0, 1, 2, height=6, width=4))


def test_a_colour_image_is_no_mask(root: Path) -> None:
    put(root / "labels/val/c.png", photo())
    with pytest.raises(BadImageError, match=rf"{root}/labels/val/c\.png: .*colour image \(mode RGB\)"):
        folder(root, split="val")[0]


def test_unknown_class_indices_are_named_with_their_file(root: Path) -> None:
    put(root / "labels/val/c.png", mask(0, 3, 7, 255))
    with pytest.raises(
        BadImageError, match=rf"{root}/labels/val/c\.png: .*indices 3, 7: allowed are 0 to 2 of the 3 classes in"
    ):
        folder(root, split="val")[0]


def test_indices_that_need_more_than_a_byte_are_an_error_without_class_names_too(root: Path) -> None:
    (root / "classes.txt").unlink()
    put(root / "labels/val/c.png", mask(0, 1).astype(np.uint16) * 256)
    with pytest.raises(BadImageError, match="indices 256: allowed are 0 to 254, and 255 for ignored"):
        folder(root, split="val")[0]


def test_a_truncated_mask_is_named(root: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(mask(0)).save(file, "PNG")
    (root / "labels/val/c.png").write_bytes(file.getvalue()[:40])
    with pytest.raises(BadImageError, match=rf"SegmentationFolder: cannot read target 0, {root}/labels/val/c\.png"):
        folder(root, split="val")[0]


def test_an_index_out_of_range_is_an_error(root: Path) -> None:
    with pytest.raises(IndexError, match="index 1 is out of range for 1 samples"):
        folder(root, split="val")[1]


def test_folders_of_the_same_classes_can_be_joined(tmp_path: Path) -> None:
    for name, value, classes in (("a", 0, "x\ny\n"), ("b", 1, "x\ny\n"), ("c", 0, "y\nx\n")):
        for part in ("images", "labels"):
            (tmp_path / name / part).mkdir(parents=True)
        Image.new("RGB", (6, 4)).save(tmp_path / name / "images" / "one.png")
        Image.new("L", (6, 4), value).save(tmp_path / name / "labels" / "one.png")
        (tmp_path / name / "classes.txt").write_text(classes)
    a, b, c = (f"SegmentationFolder:root={tmp_path / name}" for name in "abc")
    joined = make_dataset(dataset_str=f"{a}+{b}", transforms=lambda image, label: np.asarray(label))
    assert joined.class_names == ["x", "y"]
    assert [int(joined[index].max()) for index in (0, 1, -1)] == [0, 1, 1]
    with pytest.raises(ValueError, match="name different classes"):
        make_dataset(dataset_str=f"{a}+{c}")


# Objects


def with_instances(root: Path, numbers: np.ndarray) -> SegmentationFolder:
    put(root / "instances/val/c.png", numbers)
    return folder(root, split="val", instances="instances")


def test_objects_are_told_apart_by_a_third_folder(root: Path) -> None:
    put(root / "labels/val/c.png", mask(0, 0, 2, 2, 255, 255))
    dataset = with_instances(root, np.resize(np.array([0, 0, 1, 300, 300, 0], np.uint16), (4, 6)))
    label = np.asarray(dataset[0][1])
    assert dataset.has_objects and not folder(root).has_objects
    assert label.tolist() == [[0, 0, 2 + 256, 2 + 300 * 256, 255, 255]] * 4


@pytest.mark.parametrize(
    "numbers, match",
    [
        (np.resize(np.array([0, 0, 0, 0, 0, 7], np.uint16), (4, 6)), "objects 7 have no pixel with a class"),
        (np.full((4, 6), 3, np.uint16), "objects 3 have pixels of several classes"),
        (np.resize(np.array([1, 255], np.uint8), (4, 6)), "8 bits hold at most 254 objects.*16 bits"),
        (np.ones((4, 5), np.uint16), r"it is \(4, 5\), the mask \(4, 6\)"),
        (photo(), "it is a colour image"),
    ],
)
def test_objects_that_do_not_fit_the_mask_are_refused(numbers: np.ndarray, match: str, root: Path) -> None:
    put(root / "labels/val/c.png", mask(0, 0, 2, 2, 255, 255))
    dataset = with_instances(root, numbers)
    with pytest.raises(BadImageError, match=f"cannot read the objects of sample 0, .*c.png: ValueError: .*{match}"):
        dataset[0]


def test_masks_without_a_file_of_objects_are_named(root: Path) -> None:
    with pytest.raises(ValueError, match="2 of 2 masks have no file of objects in .*instances: instances/train/b.png"):
        put(root / "instances/val/c.png", mask(1))
        folder(root, split="train", instances="instances")
