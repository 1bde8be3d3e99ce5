"""Golden cases of dataset strings, extra files, listings and enumerated targets: exact."""

from __future__ import annotations

import gzip
import inspect
import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3.data.datasets.strings import DATASETS, parse_dataset_string

from . import golden

# Of each bad string the token that the message names, and what it says is allowed there.
BAD_TOKENS = {
    "": ("", ("ImageFolder", "ImageNet")),
    "Foo:root=/a": ("Foo", ("ImageFolder", "ImageNet")),
    "imagenet": ("imagenet", ("ImageFolder", "ImageNet")),
    "ImageNet:root": ("root", ("key=value", "split, root, extra")),
    "ImageNet:foo=1": ("foo", ("split, root, extra",)),
    "ImageNet:split=TRIAN": ("TRIAN", ("TRAIN, VAL, TEST",)),
    ":root=/a": ("", ("ImageFolder", "ImageNet")),
    "ADE20K:split=TEST:root=/x": ("TEST", ("ADE20K has TRAIN, VAL",)),
    "ImageNet::root=/a": ("", ("key=value", "split, root, extra")),
}


def image_net(split: str, root: Path) -> Any:
    cls = golden.target("dinov3.data.datasets.ImageNet")
    return cls(split=cls.Split[split], root=str(root), extra=str(root / "extra"))


@pytest.mark.parametrize(
    "expected",
    [
        expected
        for case_id in ("dataset-strings", "dataset-strings-extended")
        for expected in golden.case("data", case_id)["expect"]
    ],
    ids=lambda expected: expected["string"],
)
def test_dataset_string(expected: dict[str, Any]) -> None:
    (parsed,) = parse_dataset_string(expected["string"])
    cls = DATASETS[parsed.name][0]
    assert cls is golden.target(f"dinov3.data.datasets.{expected['cls']}")
    kwargs = {
        key: cls.Split[value["split"]] if isinstance(value, dict) else value  # type: ignore[attr-defined]
        for key, value in expected["kwargs"].items()
    }
    assert parsed.kwargs == kwargs


@pytest.mark.parametrize("string", golden.case("data", "dataset-strings-bad")["strings"], ids=repr)
def test_bad_dataset_string(string: str) -> None:
    token, allowed = BAD_TOKENS[string]
    with pytest.raises(ValueError) as info:
        parse_dataset_string(string)
    for text in (repr(string), repr(token), *allowed):
        assert text in str(info.value)


def test_image_net_split() -> None:
    expected = golden.case("data", "imagenet-split")["expect"]
    split = golden.target("dinov3.data.datasets.ImageNet").Split
    assert {member.name: member.value for member in split} == expected["values"]
    assert {member.name: member.length for member in split} == expected["length"]
    assert {member.name: member.get_dirname("n1") for member in split} == expected["dirname"]
    assert {member.name: member.get_image_relpath(42, "n01440764") for member in split} == expected["relpath"]
    parsed = {name: list(split[name].parse_image_relpath(expected["relpath"][name])) for name in expected["parse"]}
    assert parsed == expected["parse"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    manifest = golden.case("data", "imagenet-extra")["tree"]
    for number, name in enumerate(manifest["files"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 + 7 * number,) * 3).save(path)
    (tmp_path / "labels.txt").write_text(manifest["labels_txt"])
    return tmp_path


@pytest.mark.parametrize("split", ["TRAIN", "VAL"])
def test_image_net_extra_files_and_images(split: str, tree: Path) -> None:
    expected = golden.case("data", "imagenet-extra")["expect"][split]
    dataset = image_net(split, tree)
    dataset.dump_extra()

    assert {path.name for path in (tree / "extra").iterdir()} == expected["files"].keys()
    for name, content in expected["files"].items():
        array = np.load(tree / "extra" / name)
        fields = content["dtype"]
        assert array.dtype == (fields if isinstance(fields, str) else np.dtype([tuple(field) for field in fields])), (
            name
        )
        rows = [list(row) if isinstance(row, tuple) else row for row in array.tolist()]
        assert rows == content["values"], name

    indices = range(len(dataset))
    assert dataset.get_targets().tolist() == [dataset.get_target(index) for index in indices] == expected["targets"]
    assert [dataset.get_class_id(index) for index in indices] == expected["class_ids"]
    assert [dataset.get_class_name(index) for index in indices] == expected["class_names"]
    images = [dataset[index][0] for index in indices]
    assert [float(np.mean(image)) for image in images] == expected["image_mean"]
    for image in images:
        assert image.mode == expected["image_mode"] and list(image.size) == expected["image_size"]


def test_image_net_extra_file_of_the_test_split(tmp_path: Path) -> None:
    expected = golden.case("data", "imagenet-extra-test-split")["expect"]
    dataset = image_net("TEST", tmp_path)
    dataset.dump_extra()
    assert [path.name for path in (tmp_path / "extra").iterdir()] == [expected["only_file"]]
    entries = np.load(tmp_path / "extra" / expected["only_file"])
    assert len(entries) == len(dataset) == expected["length"]
    assert entries.dtype == np.dtype([tuple(field) for field in expected["dtype"]])
    assert [list(row) for row in entries[:2].tolist()] == expected["first"]
    assert [list(row) for row in entries[-1:].tolist()] == expected["last"]
    assert dataset.get_image_relpath(0) == expected["relpath_first"]


def make_tars(root: Path, tree: dict[str, Any]) -> None:
    for rank, (class_id, members) in enumerate(sorted(tree["tars"].items())):
        with tarfile.open(root / f"{class_id}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for member in members:
                name, size = member["name"], member["bytes"]
                info = tarfile.TarInfo(name)
                info.size = size
                tar.addfile(info, io.BytesIO(bytes((7 * j + len(name) + rank) % 251 for j in range(size))))


@pytest.mark.parametrize("with_blocks", [True, False], ids=["block logs", "headers"])
def test_image_net_22k_extra_files_and_data(with_blocks: bool, tmp_path: Path) -> None:
    case = golden.case("data", "imagenet22k-extra")
    make_tars(tmp_path, case["tree"])
    if with_blocks:
        (tmp_path / "blocks").mkdir()
        for class_id, log in case["tree"]["blocks"].items():
            (tmp_path / "blocks" / f"{class_id}.log").write_text(log)
    cls = golden.target("dinov3.data.datasets.ImageNet22k")
    dataset = cls(root=str(tmp_path), extra=str(tmp_path / "extra"))
    dataset.dump_extra()

    expected = case["expect"]
    entries = np.load(tmp_path / "extra/entries.npy")
    assert entries.dtype == np.dtype([tuple(field) for field in expected["entries"]["dtype"]])
    assert [list(row) for row in entries.tolist()] == expected["entries"]["values"]
    class_ids = np.load(tmp_path / "extra/class-ids.npy")
    assert (class_ids.dtype, class_ids.tolist()) == (expected["class_ids"]["dtype"], expected["class_ids"]["values"])

    sizes = {member["name"]: member["bytes"] for members in case["tree"]["tars"].values() for member in members}
    for index, filename in enumerate(entries["filename"]):
        data = dataset.get_image_data(index)
        assert len(data) == sizes[filename]  # the exact member; the golden values have its padding too
        padded = data.ljust(expected["data_length"][index], b"\0")
        assert zlib.crc32(padded) == expected["data_crc32"][index]
    assert dataset.get_targets().tolist() == expected["targets"]
    assert [dataset.get_target(index) for index in range(len(dataset))] == expected["targets"]


def test_image_net_22k_constants_and_gzipped_members(tmp_path: Path) -> None:
    expected = golden.case("data", "imagenet22k-gzipped")["expect"]
    cls = golden.target("dinov3.data.datasets.ImageNet22k")
    assert inspect.signature(cls).parameters["mmap_cache_size"].default == expected["mmap_cache_size"]
    # Gzipped members are told by their content, so that of the published indices none need be known.
    image = b"not in the list of indices"
    with tarfile.open(tmp_path / "n06470073.tar", "w") as tar:
        for name, data in (("a.JPEG", gzip.compress(image)), (expected["skipped_file"], b"x"), ("b.JPEG", image)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    dataset = cls(root=str(tmp_path), extra=str(tmp_path))
    dataset.dump_extra()
    assert not set(range(len(dataset))) & set(expected["gzipped_indices"])
    assert [dataset.get_image_data(index) for index in range(len(dataset))] == [image, image]


@pytest.fixture
def listed(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    case = golden.case("data", request.param)
    for name, content in case["files"].items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return case["expect"]


@pytest.mark.parametrize("listed", ["ade20k-listing"], indirect=True)
def test_ade20k_listing(listed: dict[str, Any], tmp_path: Path) -> None:
    cls = golden.target("dinov3.data.datasets.ADE20K")
    dataset = cls(cls.Split.TRAIN, str(tmp_path))
    assert dataset.image_paths == listed["image_paths"]
    assert dataset.target_paths == listed["target_paths"]
    assert {member.name: member.value for member in cls.Split} == listed["splits"]


@pytest.mark.parametrize("listed", ["nyu-listing"], indirect=True)
def test_nyu_listing(listed: dict[str, Any], tmp_path: Path) -> None:
    cls = golden.target("dinov3.data.datasets.NYU")
    dataset = cls(split=cls.Split.TRAIN, root=str(tmp_path))
    assert dataset.image_paths == listed["image_paths"]
    assert dataset.target_paths == listed["target_paths"]
    for split in (cls.Split.VAL, cls.Split.TEST):
        assert cls(split=split, root=str(tmp_path)).image_paths == listed["val_image_paths"]
    assert {member.name: member.value for member in cls.Split} == listed["splits"]


@pytest.mark.parametrize("listed", ["coco-listing"], indirect=True)
def test_coco_listing(listed: dict[str, Any], tmp_path: Path) -> None:
    cls = golden.target("dinov3.data.datasets.CocoCaptions")
    samples = cls(split=cls.Split.TRAIN, root=str(tmp_path)).image_captions
    assert [sample["image"].replace(str(tmp_path), "ROOT") for sample in samples] == listed["image_paths"]
    assert [sample["captions"] for sample in samples] == listed["captions"]
    assert [sample["id"] for sample in samples] == listed["ids"]


class NamedImages:
    """Item i is ("image<i>", target of i)."""

    def __init__(self, targets: list[int | None]) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[str, int | None]:
        return f"image{index}", self.targets[index]

    def get_target(self, index: int) -> int | None:
        return self.targets[index]


@pytest.mark.parametrize("case", golden.cases("data", "enumerated-targets-"), ids=lambda case: case["id"])
def test_enumerated_targets(case: dict[str, Any]) -> None:
    length = int(case["dataset"].removeprefix("length ").split(";")[0])
    targets = [None if "None" in case["dataset"] else 10 * index for index in range(length)]
    adapter = golden.target("dinov3.data.adapters.DatasetWithEnumeratedTargets")
    dataset = adapter(NamedImages(targets), **case["kwargs"])
    expected = case["expect"]
    assert len(dataset) == expected["len"]
    items = [dataset[index] for index in range(len(dataset))]
    assert [[image, list(target)] for image, target in items] == expected["items"]
    assert [list(dataset.get_target(index)) for index in range(len(dataset))] == expected["get_target"]
