"""What holds for every dataset: pickling, forked workers, paths, bad images and what is checked when it is opened."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.data import SamplerType, make_dataset
from dinov3.data.datasets import BadImageError
from dinov3.data.datasets.dump import dump
from dinov3.data.datasets.strings import DATASETS
from dinov3.data.loaders import make_train_data_loader

from .tars import png, write_tar

N_IMAGES = 4
BAD = 2  # the image that cannot be read
TRUNCATED = png(BAD)[:45]


def image(number: int, bad: bool) -> bytes:
    return TRUNCATED if bad and number == BAD else png(number)


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def make_image_folder(root: Path, bad: bool) -> str:
    for number in range(N_IMAGES):
        put(root / ("a" if number < 2 else "b") / f"{number}.png", image(number, bad))
    return f"ImageFolder:root={root}"


def make_image_net(root: Path, bad: bool) -> str:
    for number in range(N_IMAGES):
        put(root / "train" / "n1" / f"n1_{number}.JPEG", image(number, bad))
    put(root / "labels.txt", "n1,dog\n")
    dump(f"ImageNet:root={root}:extra={root}/extra")
    return f"ImageNet:split=TRAIN:root={root}:extra={root}/extra"


def make_image_net_22k(root: Path, bad: bool) -> str:
    write_tar(root / "n1.tar", {f"n1_{number}.JPEG": image(number, bad) for number in range(2)})
    write_tar(root / "n2.tar", {f"n2_{number}.JPEG": gzip.compress(image(number, bad)) for number in (2, 3)})
    dump(f"ImageNet22k:root={root}:extra={root}")
    return f"ImageNet22k:root={root}:extra={root}"


def make_ade20k(root: Path, bad: bool) -> str:
    for number in range(N_IMAGES):
        put(root / "images/training" / f"{number}.jpg", image(number, bad))
        put(root / "annotations/training" / f"{number}.png", png(number))
    dump(f"ADE20K:root={root}")
    return f"ADE20K:split=TRAIN:root={root}"


def make_image_net_real(root: Path, bad: bool) -> str:
    for number in range(N_IMAGES):
        put(root / "n1" / f"ILSVRC2012_val_{number + 1:08d}.JPEG", image(number, bad))
    put(root / "real.json", json.dumps([[number] for number in range(N_IMAGES)]))
    return f"ImageNetReaL:root={root}:labels={root}/real.json"


def make_image_net_c(root: Path, bad: bool) -> str:
    for number in range(N_IMAGES):
        put(root / "fog" / "1" / "n1" / f"{number}.JPEG", image(number, bad))
    return f"ImageNetC:root={root}"


def make_nyu(root: Path, bad: bool) -> str:
    for number in range(N_IMAGES):
        put(root / "scene" / f"rgb_{number}.jpg", image(number, bad))
        put(root / "scene" / f"depth_{number}.png", png(number))
    lines = [f"/scene/rgb_{number}.jpg /scene/depth_{number}.png 518.8579\n" for number in range(N_IMAGES)]
    put(root / "nyu_train.txt", "".join(lines))
    return f"NYU:split=TRAIN:root={root}"


def make_pairs(root: Path, bad: bool, targets: str, target: bytes) -> None:
    for number in range(N_IMAGES):
        put(root / "images" / "train" / f"{number}.jpg", image(number, bad))
        put(root / targets / "train" / f"{number}.png", target)


def make_depth_folder(root: Path, bad: bool) -> str:
    make_pairs(root, bad, "depth", gray_map(np.uint16))
    return f"DepthFolder:root={root}:split=train:scale=256"


def make_segmentation_folder(root: Path, bad: bool) -> str:
    make_pairs(root, bad, "labels", gray_map(np.uint8))
    put(root / "classes.txt", "sky\nsea\n")
    return f"SegmentationFolder:root={root}:split=train"


def gray_map(dtype: type) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ones((5, 6), dtype)).save(file, "PNG")  # of the size of `png`
    return file.getvalue()


def make_coco_captions(root: Path, bad: bool) -> str:
    for number in range(N_IMAGES):
        put(root / "val2017/val2017" / f"{number}.jpg", image(number, bad))
    content = {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in range(N_IMAGES)],
        "annotations": [{"image_id": number, "caption": f"gray {number}"} for number in range(N_IMAGES)],
    }
    put(root / "annotations_trainval2017/annotations/captions_val2017.json", json.dumps(content))
    return f"CocoCaptions:split=VAL:root={root}"


def make_coco_instances(root: Path, bad: bool) -> str:
    for number in range(N_IMAGES):
        put(root / "images" / f"{number}.jpg", image(number, bad))
    size = {"height": 5, "width": 6}
    content = {
        "images": [{"id": number, "file_name": f"{number}.jpg", **size} for number in range(N_IMAGES)],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 1, "segmentation": [[0, 0, 3, 0, 3, 3]]}
            for number in range(N_IMAGES)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    put(root / "instances.json", json.dumps(content))
    return f"CocoInstances:images={root / 'images'}:annotations={root / 'instances.json'}"


def make_web_dataset(root: Path, bad: bool) -> str:
    for shard in range(2):
        numbers = range(2 * shard, 2 * shard + 2)
        write_tar(root / f"{shard}.tar", {f"{number}.png": image(number, bad) for number in numbers})
    return f"WebDataset:urls={root}/{{0..1}}.tar"


def make_stream(root: Path, bad: bool) -> str:
    for shard in range(2):
        numbers = range(2 * shard, 2 * shard + 2)
        members = {f"{number}.png": image(number, bad) for number in numbers}
        write_tar(root / f"{shard}.tar.gz", members, mode="w:gz")
    return f"WebDataset:urls={root}/*.tar.gz:mode=stream:buffer=2"


def make_hf_dataset(root: Path, bad: bool) -> str:
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": image(number, bad), "path": f"{number}.png"} for number in range(N_IMAGES)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).save_to_disk(str(root))
    return f"HFDataset:path={root}"


def make_joined(root: Path, bad: bool) -> str:
    first, second = make_image_folder(root / "folder", bad), make_web_dataset(root / "shards", False)
    return f"{first}+{second}"


MAKERS: dict[str, Callable[[Path, bool], str]] = {
    "ADE20K": make_ade20k,
    "CocoCaptions": make_coco_captions,
    "CocoInstances": make_coco_instances,
    "DepthFolder": make_depth_folder,
    "HFDataset": make_hf_dataset,
    "ImageFolder": make_image_folder,
    "ImageNet": make_image_net,
    "ImageNet22k": make_image_net_22k,
    "ImageNetC": make_image_net_c,
    "ImageNetReaL": make_image_net_real,
    "NYU": make_nyu,
    "SegmentationFolder": make_segmentation_folder,
    "WebDataset": make_web_dataset,
    "WebDataset stream": make_stream,
    "joined": make_joined,
}
PATHS = {
    "ADE20K": "images/training/1.jpg",
    "CocoCaptions": "val2017/val2017/1.jpg",
    "CocoInstances": "1.jpg",
    "DepthFolder": "images/train/1.jpg",
    "HFDataset": "1.png",
    "ImageFolder": "a/1.png",
    "ImageNet": "train/n1/n1_1.JPEG",
    "ImageNet22k": "n1.tar/n1_1.JPEG",
    "ImageNetC": "fog/1/n1/1.JPEG",
    "ImageNetReaL": "n1/ILSVRC2012_val_00000002.JPEG",
    "NYU": "scene/rgb_1.jpg",
    "SegmentationFolder": "images/train/1.jpg",
    "WebDataset": "0.tar/1.png",
    "WebDataset stream": "0.tar.gz/1.png",
    "joined": "a/1.png",
}


@pytest.fixture(scope="module")
def strings(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], str]:
    """The string of a dataset of each kind, without and with a bad image."""
    return {
        (name, bad): maker(tmp_path_factory.mktemp("data") / "root", bad)
        for name, maker in MAKERS.items()
        for bad in (False, True)
    }


def checksums(dataset: Any) -> list[int]:
    return [zlib.crc32(dataset[index][0].tobytes()) for index in range(len(dataset))]


def test_every_dataset_that_a_string_can_name_is_here() -> None:
    assert set(DATASETS) <= set(MAKERS)


@pytest.mark.parametrize("name", MAKERS)
def test_images_paths_and_data(name: str, strings: dict[tuple[str, bool], str]) -> None:
    dataset = make_dataset(dataset_str=strings[name, False])
    assert len(dataset) in (N_IMAGES, 2 * N_IMAGES)
    assert [dataset[index][0].getpixel((0, 0))[0] for index in range(N_IMAGES)] == list(range(N_IMAGES))
    assert dataset.get_image_relpath(1) == PATHS[name]
    assert dataset.get_image_data(1) == png(1)
    assert dataset[0][0].mode == "RGB"


@pytest.mark.parametrize("name", MAKERS)
def test_a_pickled_copy_is_the_same(name: str, strings: dict[tuple[str, bool], str]) -> None:
    dataset = make_dataset(dataset_str=strings[name, False])
    expected = checksums(dataset)  # before it is pickled, so that whatever stays open is open
    assert checksums(pickle.loads(pickle.dumps(dataset))) == expected


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_processes_read_the_same(strings: dict[tuple[str, bool], str]) -> None:
    opened = [make_dataset(dataset_str=strings[name, False]) for name in MAKERS]
    expected = [checksums(dataset) for dataset in opened]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(checksums, opened) == expected
    assert [checksums(dataset) for dataset in opened] == expected


@pytest.mark.parametrize("name", MAKERS)
def test_a_bad_image_is_named(name: str, strings: dict[tuple[str, bool], str]) -> None:
    dataset = make_dataset(dataset_str=strings[name, True])
    path = dataset.get_image_relpath(BAD)
    cls = {"joined": "ImageFolder"}.get(name, name.partition(" ")[0])
    with pytest.raises(BadImageError, match=rf"{cls}: cannot read image {BAD}, /.*{path}: "):
        dataset[BAD]


def grays(samples: list[Any]) -> dict[str, Any]:
    return {"grays": torch.tensor([image.getpixel((0, 0))[0] for image, _ in samples])}


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "joined"])
def test_a_bad_image_is_replaced_in_training(name: str, strings: dict[tuple[str, bool], str]) -> None:
    loader = make_train_data_loader(
        dataset=make_dataset(dataset_str=strings[name, True], on_bad_image="skip"),
        batch_size=N_IMAGES,
        num_workers=0,
        sampler_type=SamplerType.INFINITE,
        sampler_seed=0,
        collate_fn=grays,
        seed_key=(0, 0, 0),
        on_bad_image="skip",
    )
    batch = next(iter(loader))
    assert sorted(batch["grays"].tolist()) == [0, 1, 3, 3] and batch["n_bad_images"] == 1


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "joined"])
def test_images_that_a_file_lists_are_skipped(name: str, strings: dict[tuple[str, bool], str], tmp_path: Path) -> None:
    whole = make_dataset(dataset_str=strings[name, True])
    put(tmp_path / "skip.txt", f"{whole.get_image_relpath(BAD)}\r\n")
    dataset = make_dataset(dataset_str=f"{strings[name, True]}:skip={tmp_path}/skip.txt", transform=np.asarray)
    assert [dataset[index][0][0, 0, 0] for index in range(len(dataset))] == [0, 1, 3]
    assert [dataset.get_image_relpath(index) for index in range(3)] == [whole.get_image_relpath(i) for i in (0, 1, 3)]
    assert getattr(dataset, "classes", None) == getattr(whole, "classes", None)
    if hasattr(whole, "get_targets") and (targets := whole.get_targets()) is not None:
        assert np.array_equal(dataset.get_targets(), np.asarray(targets)[[0, 1, 3]])
        assert np.array_equal(dataset.get_target(2), whole.get_target(3))
    assert len(pickle.loads(pickle.dumps(dataset))) == 3


def test_a_stream_without_skipped_images_is_trained_on(strings: dict[tuple[str, bool], str], tmp_path: Path) -> None:
    put(tmp_path / "skip.txt", f"{make_dataset(dataset_str=strings['WebDataset stream', True]).get_image_relpath(BAD)}")
    dataset = make_dataset(dataset_str=f"{strings['WebDataset stream', True]}:skip={tmp_path}/skip.txt")
    assert dataset.stream.counts.tolist() == [2, 1]
    loader = make_train_data_loader(
        dataset=dataset,
        batch_size=3,
        num_workers=0,
        sampler_type=SamplerType.INFINITE,
        sampler_seed=0,
        collate_fn=grays,
        seed_key=(0, 0, 0),
    )
    assert [sorted(batch["grays"].tolist()) for batch in itertools.islice(loader, 2)] == [[0, 1, 3]] * 2


def test_a_skip_list_that_fits_nothing_or_everything_is_refused(
    strings: dict[tuple[str, bool], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def open_without(*lines: str) -> Any:
        put(tmp_path / "skip.txt", "".join(f"{line}\n" for line in lines))
        return make_dataset(dataset_str=f"{strings['ImageFolder', False]}:skip={tmp_path}/skip.txt")

    with pytest.raises(ValueError, match=r"lists no image of this dataset: it has x/1\.png, but .* such as a/0\.png"):
        open_without("x/1.png")
    with pytest.raises(ValueError, match="lists all 4 images of this dataset"):
        open_without("a/0.png", "a/1.png", "b/2.png", "b/3.png")
    assert len(open_without("a/0.png", "x/1.png")) == 3
    assert "1 lines of skip=" in caplog.text and "name no image: x/1.png" in caplog.text
    assert len(open_without()) == 4
    with pytest.raises(FileNotFoundError, match=r"skip=.*none\.txt is not a file"):
        make_dataset(dataset_str=f"{strings['ImageFolder', False]}:skip={tmp_path}/none.txt")


def test_joined_datasets_skip_each_their_own(strings: dict[tuple[str, bool], str], tmp_path: Path) -> None:
    put(tmp_path / "skip.txt", "images/train/0.jpg\n")
    one = f"SegmentationFolder:{strings['SegmentationFolder', False].partition(':')[2]}"
    dataset = make_dataset(dataset_str=f"{one}:skip={tmp_path}/skip.txt+{one}")
    assert len(dataset) == 2 * N_IMAGES - 1 and dataset.class_names == ["sky", "sea"]
    assert dataset[0][1].size == (6, 5)  # maps are still returned


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "joined"])
def test_a_missing_directory_is_named(name: str, strings: dict[tuple[str, bool], str], tmp_path: Path) -> None:
    root = strings[name, False].partition("root=")[2].partition(":")[0]
    root = root or os.path.dirname(strings[name, False].partition("urls=")[2].partition(":")[0])
    root = root or strings[name, False].partition("path=")[2]
    root = root or strings[name, False].partition("images=")[2].partition("/images:")[0]
    string = strings[name, False].replace(root, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=rf"{name.partition(' ')[0]}: .*{tmp_path}/nowhere"):
        make_dataset(dataset_str=string)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "joined"])
def test_an_empty_directory_is_named(name: str, strings: dict[tuple[str, bool], str], tmp_path: Path) -> None:
    copy = tmp_path / "root"
    string = MAKERS[name](copy, False)
    shutil.rmtree(copy)
    copy.mkdir()
    with pytest.raises(FileNotFoundError, match=rf"{name.partition(' ')[0]}: .*{copy}"):
        len(make_dataset(dataset_str=string))
