"""ADE20K, NYU and COCO captions: images that a file lists, with a map or with captions as target."""

from __future__ import annotations

import io
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3.data import SamplerType
from dinov3.data.datasets import ADE20K, NYU, BadImageError, CocoCaptions
from dinov3.data.datasets import dump as dump_module
from dinov3.data.datasets.decoders import ImageDataDecoder, TargetDecoder
from dinov3.data.loaders import make_train_data_loader

from .tars import cut_off, png


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def encoded(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    return put(
        tmp_path,
        {
            "images/training/2.jpg": png(2),
            "images/training/1.x.jpg": png(1),
            "images/validation/3.jpg": png(3),
            "annotations/training/2.png": encoded(np.full((5, 6), 20, np.uint8)),
            "annotations/training/1.x.png": encoded(np.full((5, 6), 150, np.uint8)),
            "annotations/validation/3.png": encoded(np.full((5, 6), 30, np.uint8)),
            "ADE20K_object150_train.txt": "\ntraining/2.jpg\n  \ntraining/1.x.jpg\n",
        },
    )


@pytest.fixture
def nyu(tmp_path: Path) -> Path:
    return put(
        tmp_path,
        {
            "kitchen/rgb_1.jpg": png(1),
            "kitchen/depth_1.png": encoded(np.full((5, 6), 40_000, np.uint16)),
            "nyu_test.txt": "\n/kitchen/rgb_1.jpg /kitchen/depth_1.png 518.8579\n\n",
        },
    )


COCO = {
    "images": [
        {"id": 5, "file_name": "five.jpg"},
        {"id": 2, "file_name": "two.jpg"},
        {"id": 9, "file_name": "none.jpg"},
    ],
    "annotations": [{"image_id": 2, "caption": caption} for caption in "abcdefgh"] + [{"image_id": 5, "caption": "z"}],
}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return put(
        tmp_path,
        {
            "val2017/val2017/five.jpg": png(5),
            "val2017/val2017/two.jpg": png(2),
            "annotations_trainval2017/annotations/captions_val2017.json": json.dumps(COCO),
        },
    )


def make(cls: Any, root: Path | str | None, **kwargs: Any) -> Any:
    split = {ADE20K: "TRAIN", NYU: "TEST", CocoCaptions: "VAL"}[cls]
    return cls(split=cls.Split[split], root=None if root is None else str(root), **kwargs)


# Maps


def test_ade20k_gives_images_and_maps_of_classes(ade20k: Path) -> None:
    dataset = make(ADE20K, ade20k)
    assert len(dataset) == 2
    image, target = dataset[0]
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (1, 1, 1)
    assert target.mode == "L" and np.unique(target).tolist() == [150]
    assert dataset.get_image_relpath(1) == "images/training/2.jpg"
    assert dataset.target_paths[1] == "annotations/training/2.png"
    assert [split.dirname for split in ADE20K.Split] == ["training", "validation"]


def test_ade20k_takes_its_arguments_by_position(ade20k: Path) -> None:
    def transforms(image: Any, target: Any) -> tuple[Any, Any]:
        return "image", target

    dataset = ADE20K(ADE20K.Split.TRAIN, str(ade20k), transforms, None, None, ImageDataDecoder, TargetDecoder)
    assert dataset[0] == ("image", (ade20k / "annotations/training/1.x.png").read_bytes())


def test_ade20k_listings_are_written_from_the_directories(ade20k: Path) -> None:
    dump_module.main([f"ADE20K:root={ade20k}"])
    assert (ade20k / "ADE20K_object150_train.txt").read_text() == "training/1.x.jpg\ntraining/2.jpg\n"
    assert ADE20K(ADE20K.Split.VAL, str(ade20k)).image_paths == ["images/validation/3.jpg"]


def test_ade20k_listing_of_one_split_and_of_none(ade20k: Path) -> None:
    (ade20k / "ADE20K_object150_train.txt").unlink()
    dump_module.main([f"ADE20K:split=VAL:root={ade20k}"])
    assert not (ade20k / "ADE20K_object150_train.txt").exists()
    with pytest.raises(FileNotFoundError, match="annotations/images has none of the directories training, validation"):
        dump_module.main([f"ADE20K:root={ade20k}/annotations"])


def test_nyu_gives_images_and_depths_in_millimetres(nyu: Path) -> None:
    dataset = make(NYU, nyu)
    image, target = dataset[0]
    assert image.mode == "RGB" and target.mode == "I;16" and np.unique(target).tolist() == [40_000]
    assert dataset.get_image_relpath(0) == "kitchen/rgb_1.jpg"
    with pytest.raises(TypeError):
        NYU(NYU.Split.TEST, str(nyu))  # type: ignore[misc]


def test_nyu_line_without_a_depth_is_quoted(nyu: Path) -> None:
    (nyu / "nyu_test.txt").write_text("kitchen/rgb_1.jpg\n")
    with pytest.raises(ValueError, match=r"nyu_test\.txt: expected a line such as .*, found 'kitchen/rgb_1\.jpg'"):
        make(NYU, nyu)


def test_transforms_are_applied_to_both(nyu: Path) -> None:
    dataset = make(NYU, nyu, transform=lambda image: image.size, target_transform=lambda target: target.mode)
    assert dataset[0] == ((6, 5), "I;16")


@pytest.mark.parametrize("problem", ["truncated", "deleted"])
def test_a_bad_map_is_named_and_can_be_skipped(problem: str, ade20k: Path) -> None:
    path = ade20k / "annotations/training/1.x.png"
    cut_off(path, 40) if problem == "truncated" else path.unlink()
    with pytest.raises(BadImageError, match=rf"ADE20K: cannot read target 0, {path}: "):
        make(ADE20K, ade20k)[0]


# Captions


def test_validation_captions_are_those_of_the_validation_images(coco: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = make(CocoCaptions, coco)
    assert [sample["id"] for sample in dataset.image_captions] == [5, 2]
    assert "CocoCaptions: 1 images" in caplog.text and "have no caption and are left out" in caplog.text
    image, caption = dataset[0]
    assert image.getpixel((0, 0)) == (5, 5, 5) and caption == "z"
    assert dataset.get_captions(1) == list("abcdefgh")
    assert dataset.get_image_relpath(1) == "val2017/val2017/two.jpg"


def test_a_caption_is_drawn_from_the_generator_that_a_loader_seeds(coco: Path) -> None:
    dataset = make(CocoCaptions, coco)
    draws = set()
    for seed in range(30):
        random.seed(seed)
        first = dataset.get_target(1)
        random.seed(seed)
        assert dataset.get_target(1) == first
        draws.add(first)
    assert len(draws) > 4


def captions(samples: list[Any]) -> dict[str, Any]:
    return {"captions": [caption for _, caption in samples]}


def test_captions_of_a_training_batch_depend_on_its_number_alone(coco: Path) -> None:
    def batches(first: int, count: int) -> list[list[str]]:
        loader = iter(
            make_train_data_loader(
                dataset=make(CocoCaptions, coco),
                batch_size=4,
                num_workers=0,
                sampler_type=SamplerType.INFINITE,
                sampler_seed=0,
                collate_fn=captions,
                seed_key=(0, 0, 0),
                first_batch=first,
            )
        )
        return [next(loader)["captions"] for _ in range(count)]

    whole = batches(0, 6)
    random.seed(123)
    assert batches(2, 4) == whole[2:]
    assert len(set(sum(whole, []))) > 4


@pytest.mark.parametrize("content", ["[]", '{"images": [], "x": 1}', '{"images": [{"id": 1}], "annotations": []}', "{"])
def test_a_file_that_has_no_coco_captions_is_named(content: str, coco: Path) -> None:
    put(coco, {"annotations_trainval2017/annotations/captions_val2017.json": content})
    with pytest.raises(ValueError, match=r"captions_val2017\.json is not a file of COCO captions .*expected `images`"):
        make(CocoCaptions, coco)


def test_no_caption_at_all_is_an_error(coco: Path) -> None:
    empty = json.dumps({"images": COCO["images"], "annotations": []})
    put(coco, {"annotations_trainval2017/annotations/captions_val2017.json": empty})
    with pytest.raises(ValueError, match="none of the 3 images in .* has a caption"):
        make(CocoCaptions, coco)


# All of them


@pytest.mark.parametrize("cls", [ADE20K, NYU, CocoCaptions])
def test_a_missing_root_or_listing_is_named(cls: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for nothing in (None, ""):
        with pytest.raises(ValueError, match=f"{cls.__name__}: give root=DIRECTORY"):
            make(cls, nothing)
    with pytest.raises(FileNotFoundError, match=rf"{cls.__name__}: root='{tmp_path}/nowhere' is not a directory"):
        make(cls, tmp_path / "nowhere")
    listing = {ADE20K: "ADE20K_object150_train.txt", NYU: "nyu_test.txt", CocoCaptions: "captions_val2017.json"}[cls]
    with pytest.raises(FileNotFoundError, match=rf"{cls.__name__}: {tmp_path}/.*{listing} does not exist; it "):
        make(cls, tmp_path)


@pytest.mark.parametrize(("cls", "listing"), [(ADE20K, "ADE20K_object150_train.txt"), (NYU, "nyu_test.txt")])
def test_an_empty_listing_is_an_error(cls: Any, listing: str, tmp_path: Path) -> None:
    put(tmp_path, {listing: "\n \n"})
    with pytest.raises(ValueError, match=rf"{cls.__name__}: .*{listing} is empty; it has one line per image, e\.g\. "):
        make(cls, tmp_path)
