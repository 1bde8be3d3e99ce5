"""ImageNet-1k, whole or in part: extra files, and what is said when something is missing."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3.data import make_dataset
from dinov3.data.datasets import BadImageError, ImageNet
from dinov3.data.datasets import dump as dump_module

FILES = (
    "train/n1/n1_100.JPEG",
    "train/n1/n1_9.JPEG",
    "train/n3/n3_5.JPEG",
    "val/n1/ILSVRC2012_val_00000007.JPEG",
    "val/n3/ILSVRC2012_val_00000002.JPEG",
)
Split = ImageNet.Split


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(FILES):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2), (number, 0, 0)).save(path)
    # More rows than directories, in another order.
    (tmp_path / "labels.txt").write_text('n3,"toilet tissue, toilet paper"\nn2,tench\nn1,dog\n')
    return tmp_path


def image_net(root: Path, split: ImageNet.Split = Split.TRAIN) -> ImageNet:
    return ImageNet(split=split, root=str(root), extra=str(root / "extra"))


def dumped(root: Path, split: ImageNet.Split = Split.TRAIN) -> ImageNet:
    dataset = image_net(root, split)
    dataset.dump_extra()
    return dataset


def test_names_are_looked_up_by_id_and_never_cut(root: Path) -> None:
    dataset = dumped(root)
    assert [dataset.find_class_name(index) for index in (0, 1)] == ["dog", "toilet tissue, toilet paper"]
    assert [dataset.get_class_name(index) for index in range(3)] == ["dog", "dog", "toilet tissue, toilet paper"]
    assert dataset.find_class_id(1) == "n3" and dataset.classes == ["n1", "n3"]
    assert np.load(root / "extra/class-names-TRAIN.npy").dtype == "<U27"


def test_targets_and_paths(root: Path) -> None:
    dataset = dumped(root, Split.VAL)
    assert len(dataset) == 2 and dataset.split is Split.VAL
    assert dataset.get_targets().tolist() == [0, 1] and dataset.get_targets().dtype == np.uint32
    assert [dataset.get_image_relpath(index) for index in range(2)] == list(FILES[3:])
    image, target = dataset[1]
    assert image.size == (3, 2) and target == 1 and type(target) is int


def test_a_part_of_imagenet_is_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = dumped(root)
    with caplog.at_level(logging.WARNING, "dinov3"):
        assert len(dataset) == 3 and len(dataset) == 3
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"ImageNet TRAIN has 3 images in {root}/extra/entries-TRAIN.npy, the complete split has 1281167"
    ]


def test_test_split_has_no_classes(root: Path) -> None:
    dataset = dumped(root, Split.TEST)
    assert dataset.get_target(0) is None and dataset.get_targets() is None
    assert dataset.get_class_id(0) is None and dataset.get_class_name(0) is None and dataset.classes is None
    for find in (dataset.find_class_id, dataset.find_class_name):
        with pytest.raises(AssertionError, match="TEST split of ImageNet has no classes"):
            find(0)


def test_missing_extra_file_is_named_with_the_lines_that_write_it(root: Path) -> None:
    with pytest.raises(FileNotFoundError) as info:
        len(image_net(root))
    message = str(info.value)
    assert f"{root}/extra/entries-TRAIN.npy does not exist" in message
    assert f"python -m dinov3.data.datasets.dump 'ImageNet:root={root}:extra={root}/extra'" in message
    line = message.splitlines()[-1].strip()
    exec(line, {"ImageNet": ImageNet})  # the advice has to work
    assert len(image_net(root)) == 3


def test_image_of_a_dataset_without_extra_files_says_so_too(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="entries-TRAIN.npy does not exist"):
        image_net(root)[0]


@pytest.mark.parametrize("missing", ["root", "split", "labels"])
def test_missing_parts_are_named(root: Path, missing: str) -> None:
    if missing == "root":
        with pytest.raises(FileNotFoundError, match=r"root='.*/nowhere' is not a directory"):
            image_net(root / "nowhere")
    elif missing == "split":
        (root / "train").rename(root / "training")
        with pytest.raises(FileNotFoundError, match=r"directory .*/train does not exist"):
            dumped(root)
    else:
        (root / "labels.txt").unlink()
        with pytest.raises(
            FileNotFoundError, match=r"/labels\.txt does not exist; its lines are `class id,class name`"
        ):
            dumped(root)


def test_split_without_images_shows_an_example(root: Path) -> None:
    (root / "empty/train/n1").mkdir(parents=True)
    (root / "empty/labels.txt").write_text("n1,dog\n")
    with pytest.raises(FileNotFoundError, match=r"no images in .*expected e\.g\. train/n01440764/n01440764_42\.JPEG"):
        dumped(root / "empty")


def test_class_without_a_label_is_named(root: Path) -> None:
    (root / "labels.txt").write_text("n1,dog\n")
    with pytest.raises(ValueError, match=r"class 'n3' .* has no row in .*labels\.txt"):
        dumped(root)


@pytest.mark.parametrize("row", ["n1", "n1,dog,domestic"])
def test_label_row_that_has_not_two_columns_is_quoted(root: Path, row: str) -> None:
    (root / "labels.txt").write_text(f"n3,cat\n{row}\n")
    with pytest.raises(ValueError, match=r"labels\.txt: expected `class id,class name`.*\['n1'"):
        dumped(root)


@pytest.mark.parametrize("name", ["n1_x.JPEG", "n3_4.JPEG", "photo.png"])
def test_file_that_is_not_named_like_imagenets_is_quoted(root: Path, name: str) -> None:
    (root / "train/n1" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"'train/n1/{name}' is not named like an ImageNet image of TRAIN"):
        dumped(root)


def test_paths_of_the_test_split_cannot_be_parsed() -> None:
    with pytest.raises(ValueError, match="TEST split have no class"):
        Split.TEST.parse_image_relpath("test/ILSVRC2012_test_00000001.JPEG")


def test_truncated_image_is_named(root: Path) -> None:
    dataset = dumped(root)
    path = root / FILES[1]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadImageError, match=rf"ImageNet: cannot read image 1, {path}: "):
        dataset[1]


def test_extra_files_are_never_seen_half_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dumped(root)
    before = (root / "extra/entries-TRAIN.npy").read_bytes()
    (root / FILES[0]).unlink()

    def fail(file: object, array: np.ndarray) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        dumped(root)
    assert (root / "extra/entries-TRAIN.npy").read_bytes() == before
    assert sorted(path.name for path in (root / "extra").iterdir()) == [
        "class-ids-TRAIN.npy",
        "class-names-TRAIN.npy",
        "entries-TRAIN.npy",
    ]


def test_dump_renews_what_was_read_before(root: Path) -> None:
    dataset = dumped(root)
    assert len(dataset) == 3
    (root / FILES[0]).unlink()
    dataset.dump_extra()
    assert len(dataset) == 2


def test_entries_are_memory_mapped_and_not_pickled(root: Path) -> None:
    dataset = dumped(root, Split.TEST)
    assert isinstance(dataset._entries, np.memmap)
    data = pickle.dumps(dataset)
    assert len(data) < 10_000
    assert len(pickle.loads(data)) == 100_000


def test_pickled_dataset_reads_images(root: Path) -> None:
    copy = pickle.loads(pickle.dumps(dumped(root)))
    assert copy[2][1] == 1 and copy.get_image_relpath(2) == FILES[2]


def test_make_dataset_opens_it(root: Path) -> None:
    dumped(root)
    dataset = make_dataset(dataset_str=f"ImageNet:split=train:root={root}:extra={root}/extra")
    assert isinstance(dataset, ImageNet) and len(dataset) == 3


# python -m dinov3.data.datasets.dump


def test_command_writes_all_splits_that_are_present(root: Path) -> None:
    dump_module.main([f"ImageNet:root={root}:extra={root}/extra"])
    assert sorted(path.name for path in (root / "extra").glob("entries-*")) == ["entries-TRAIN.npy", "entries-VAL.npy"]


def test_command_writes_one_split(root: Path) -> None:
    dump_module.main([f"ImageNet:split=VAL:root={root}:extra={root}/extra"])
    assert [path.name for path in (root / "extra").glob("entries-*")] == ["entries-VAL.npy"]


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("ImageFolder:root={root}", "only ADE20K, ImageNet, ImageNet22k, WebDataset have extra files"),
        ("ImageNet:root={root}", "give extra=DIRECTORY"),
        ("ImageNet:root={root}/val:extra={root}/extra", "none of the directories train, val, test"),
        ("ImageNet:split=TRIAN:root={root}:extra={root}/extra", "did you mean 'TRAIN'"),
    ],
)
def test_command_says_what_is_wrong(root: Path, string: str, message: str) -> None:
    with pytest.raises((ValueError, OSError)) as info:
        dump_module.main([string.format(root=root)])
    assert message in str(info.value)
