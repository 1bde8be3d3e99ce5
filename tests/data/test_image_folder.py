"""Any directory tree of images: which files count, in which order, with which labels."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder as TorchvisionImageFolder

from dinov3.data.datasets import ImageFolder, listing


def put(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2), (number, 0, 0)).save(path, "PNG")
    return root


def relpaths(dataset: ImageFolder) -> list[str]:
    return [dataset.get_image_relpath(index) for index in range(len(dataset))]


def folder(root: Path, **kwargs: str) -> ImageFolder:
    return ImageFolder(root=str(root), **kwargs)


# Which files, in which order


def test_images_of_any_depth_and_case_are_found_and_hidden_ones_are_not(tmp_path: Path) -> None:
    put(tmp_path, "a/1.JPG", "a/deep/deeper/2.Png", "b/3.webp", ".hidden/4.png", "a/.5.png", "b/6.jpeg", "b/7.tiff")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "b" / "png").write_text("no image either")
    assert relpaths(folder(tmp_path)) == ["a/1.JPG", "a/deep/deeper/2.Png", "b/3.webp", "b/6.jpeg", "b/7.tiff"]


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "jp2", "j2k", "apng", "dib", "pnm", "qoi", "tga", "JFIF"])
def test_less_usual_images_are_read(suffix: str, tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), (255, 0, 0)).save(tmp_path / f"1.{suffix}")
    image = folder(tmp_path)[0][0]
    assert image.size == (3, 2) and image.getpixel((0, 0))[0] >= 250 and max(image.getpixel((0, 0))[1:]) <= 5


def test_images_that_are_left_out_are_counted_by_suffix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a/1.png")
    for name in ("2.heic", "3.HEIC", "4.dng", "notes.txt"):
        (tmp_path / "a" / name).write_bytes(b"x")
    assert relpaths(folder(tmp_path)) == ["a/1.png"]
    assert f"{tmp_path}: left out 2 .heic, 1 .dng; only files ending in jpg, jpeg, " in caplog.text
    (tmp_path / "a" / "1.png").unlink()
    (tmp_path / "a" / "hash").write_bytes(b"x")
    kinds = "saw 5 other files in 2 directories: 2 .heic, 1 .dng, 1 .txt, 1 without an extension"
    with pytest.raises(FileNotFoundError, match=kinds):
        folder(tmp_path)


def test_order_and_classes_are_torchvisions(tmp_path: Path) -> None:
    names = [
        "b/9.png",
        "b/100.png",
        "b/10.png",
        "b/x y/1.png",
        "b/x/2.png",
        "a b/1.png",
        "a/z/1.png",
        "a/b.png",
        "B/1.png",
    ]
    put(tmp_path, *names, "a/z-1/1.png", "a/z/a/1.png")
    dataset, reference = folder(tmp_path), TorchvisionImageFolder(str(tmp_path))
    assert [str(tmp_path / path) for path in relpaths(dataset)] == [path for path, _ in reference.samples]
    assert dataset.classes == reference.classes
    assert dataset.get_targets().tolist() == reference.targets


def test_loose_images_are_ordered_by_their_first_path_component(tmp_path: Path) -> None:
    put(tmp_path, "b/1.png", "a.png", "c.png", "b.png")
    assert relpaths(folder(tmp_path)) == ["a.png", "b/1.png", "b.png", "c.png"]


def test_symbolic_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    elsewhere = put(tmp_path / "elsewhere", "deep/1.png", "2.png")
    root = put(tmp_path / "root", "a/1.png")
    (root / "b").symlink_to(elsewhere)
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to("self")
    (root / "a" / "broken.png").symlink_to("nowhere.png")
    (root / "a" / "file.png").symlink_to(elsewhere / "2.png")
    assert relpaths(folder(root)) == ["a/1.png", "a/file.png", "b/2.png", "b/deep/1.png"]


def test_linked_directory_inside_the_tree_keeps_its_own_name(tmp_path: Path) -> None:
    put(tmp_path, "z/1.png", "b/2.png")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    assert relpaths(folder(tmp_path)) == ["b/2.png", "z/1.png"]


def test_names_that_are_no_text_are_kept(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff\n.png")
    dataset = folder(tmp_path)
    assert os.fsencode(dataset.get_image_relpath(0)) == b"\xff\n.png"
    assert dataset[0][0].size == (3, 2)


def test_paths_are_held_in_one_buffer(tmp_path: Path) -> None:
    dataset = folder(put(tmp_path, "a/1.png", "b/2.png"))
    assert dataset._paths.buffer.tobytes() == b"a/1.png\0b/2.png\0"


# Labels


def test_folders_are_classes(tmp_path: Path) -> None:
    dataset = folder(put(tmp_path, "dog/1.png", "cat/x/2.png", "cat/3.png"))
    assert dataset.classes == ["cat", "dog"]
    assert dataset.get_targets().tolist() == [0, 0, 1] and dataset.get_targets().dtype == np.int64
    assert [dataset[index][1] for index in range(3)] == [0, 0, 1]
    assert dataset.find_class_name(1) == "dog" and dataset.get_class_name(0) == "cat"


@pytest.mark.parametrize("names", [("a/1.png", "2.png", "b/3.png"), ("a/1.png", "a/2.png"), ("1.png",)])
def test_auto_finds_no_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    dataset = folder(put(tmp_path, *names))
    assert dataset.classes is None and dataset.get_targets() is None
    assert dataset.get_target(0) is None and dataset.get_class_name(0) is None and dataset[0][1] is None
    with pytest.raises(ValueError, match="read without labels"):
        dataset.find_class_name(0)


def test_directories_without_images_are_no_classes(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "empty").mkdir()
    assert folder(tmp_path).classes == ["a", "b"]


def test_one_folder_is_a_class_when_asked(tmp_path: Path) -> None:
    dataset = folder(put(tmp_path, "a/1.png", "a/2.png"), labels="folder")
    assert dataset.classes == ["a"] and dataset.get_targets().tolist() == [0, 0]


def test_labels_can_be_declined(tmp_path: Path) -> None:
    assert folder(put(tmp_path, "a/1.png", "b/2.png"), labels="none").get_targets() is None


def test_image_outside_of_the_class_folders_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels=folder, but .*/loose\.png is not in a class folder.*labels=none"):
        folder(put(tmp_path, "a/1.png", "loose.png"), labels="folder")


def test_unknown_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels='folders' is not one of auto, folder, none"):
        folder(put(tmp_path, "a/1.png"), labels="folders")


# Split


@pytest.mark.parametrize("split", ["train", "TRAIN", "Train"])
def test_split_is_a_sub_directory_as_written_or_in_lower_case(tmp_path: Path, split: str) -> None:
    dataset = folder(put(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png"), split=split)
    assert relpaths(dataset) == ["train/a/1.png", "train/b/2.png"]
    assert dataset.classes == ["a", "b"]
    assert dataset[1][0].getpixel((0, 0)) == (1, 0, 0)


def test_split_as_written_comes_first(tmp_path: Path) -> None:
    assert relpaths(folder(put(tmp_path, "TRAIN/1.png", "train/2.png"), split="TRAIN")) == ["TRAIN/1.png"]


def test_missing_split_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*/test; .* has the directories train, val"):
        folder(put(tmp_path, "val/1.png", "train/1.png"), split="test")


# What may be wrong


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"root='.*/nowhere' is not a directory"):
        folder(tmp_path / "nowhere")


def test_directory_without_images_says_what_was_looked_for_and_seen(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "b.npy", "sub/c.mp4"):
        (tmp_path / name).write_text("x")
    with pytest.raises(
        FileNotFoundError, match=r"no images in .*jpg, jpeg, png.*3 other files in 2 directories"
    ) as info:
        folder(tmp_path)
    assert str(tmp_path) in str(info.value)


def test_unreadable_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a/1.png", "secret/2.png")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(listing.os, "scandir", refusing)
    with pytest.raises(PermissionError, match=r"cannot read the directory .*/secret"):
        folder(tmp_path)


# Cached listing


def test_listing_is_read_from_the_cache_until_a_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, extra = put(tmp_path / "root", "a/1.png", "b/2.png"), tmp_path / "extra"
    first = folder(root, extra=str(extra))
    walks = []
    walk = listing.list_images
    monkeypatch.setattr(listing, "list_images", lambda directory: walks.append(directory) or walk(directory))
    again = folder(root, extra=str(extra))
    assert not walks and relpaths(again) == relpaths(first) and again.classes == ["a", "b"]

    put(root, "b/3.png")
    os.utime(root / "b", ns=(1, 1))  # whatever the clock's resolution
    assert relpaths(folder(root, extra=str(extra))) == ["a/1.png", "b/2.png", "b/3.png"]
    assert len(walks) == 1


@pytest.mark.parametrize("extra", ["", "a", "cache", "new/cache"])
def test_the_cache_may_lie_in_the_tree(extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a/1.png", "b/2.png")
    kwargs = {"extra": str(tmp_path / extra)}
    first = folder(tmp_path, **kwargs)
    walk = listing.list_images
    with monkeypatch.context() as patch:
        patch.setattr(listing, "list_images", None)
        assert relpaths(folder(tmp_path, **kwargs)) == relpaths(first) == ["a/1.png", "b/2.png"]
    walks = []
    monkeypatch.setattr(listing, "list_images", lambda directory: walks.append(directory) or walk(directory))
    put(tmp_path, "a/3.png")
    assert relpaths(folder(tmp_path, **kwargs)) == ["a/1.png", "a/3.png", "b/2.png"] and len(walks) == 1


def test_each_searched_directory_has_its_own_cache(tmp_path: Path) -> None:
    root, extra = put(tmp_path / "root", "train/1.png", "val/2.png"), str(tmp_path / "extra")
    for split in ("train", "val", "train"):
        assert relpaths(folder(root, split=split, extra=extra))[0].startswith(split)


def test_removed_directory_and_broken_cache_lead_to_a_new_walk(tmp_path: Path) -> None:
    root, extra = put(tmp_path / "root", "a/1.png", "b/2.png"), tmp_path / "extra"
    folder(root, extra=str(extra))
    (root / "b/2.png").unlink()
    (root / "b").rmdir()
    assert relpaths(folder(root, extra=str(extra))) == ["a/1.png"]
    for file in extra.iterdir():
        file.write_bytes(b"broken")
    assert relpaths(folder(root, extra=str(extra))) == ["a/1.png"]


# Workers


@pytest.mark.parametrize("cached", [False, True])
def test_it_can_be_pickled(tmp_path: Path, cached: bool) -> None:
    put(tmp_path / "root", "a/1.png", "b/2.png")
    kwargs = {"extra": str(tmp_path / "extra")} if cached else {}
    for _ in range(2):
        dataset = folder(tmp_path / "root", **kwargs)
    copy = pickle.loads(pickle.dumps(dataset))
    assert relpaths(copy) == relpaths(dataset)
    assert copy[1][0].getpixel((0, 0)) == (1, 0, 0) and copy[1][1] == 1
