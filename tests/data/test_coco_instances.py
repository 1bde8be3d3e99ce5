"""Object maps from annotations in COCO's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3.data.datasets.coco_instances import CocoInstances
from dinov3.data.datasets.object_maps import IGNORED, NOTHING, STEP

SQUARE = [0, 0, 4, 0, 4, 4, 0, 4]  # the left half
CONTENT: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.png", "height": 4, "width": 8},
        {"id": 3, "file_name": "b.png", "height": 4, "width": 8},
    ],
    "categories": [{"id": 90, "name": "dog"}, {"id": 5, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 90, "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]},
        {"id": 2, "image_id": 7, "category_id": 5, "segmentation": [SQUARE]},
        # Column by column: the last two columns.
        {
            "id": 3,
            "image_id": 7,
            "category_id": 5,
            "iscrowd": 1,
            "segmentation": {"size": [4, 8], "counts": [24, 8]},
        },
    ],
}


def make(directory: Path, **changes: Any) -> CocoInstances:
    (directory / "photos").mkdir(exist_ok=True)
    for name in ("a", "b"):
        Image.new("RGB", (8, 4)).save(directory / "photos" / f"{name}.png")
    (directory / "instances.json").write_text(json.dumps({**CONTENT, **changes}))
    return CocoInstances(images=str(directory / "photos"), annotations=str(directory / "instances.json"))


def test_small_objects_lie_on_large_ones_and_crowds_do_not_count(tmp_path: Path) -> None:
    dataset = make(tmp_path)
    assert dataset.class_names == ["cat", "dog"] and dataset.get_image_relpath(0) == "a.png"
    label = np.asarray(dataset[0][1])
    cat, dog = 0 + STEP, 1 + 2 * STEP
    assert label[0].tolist() == [dog, cat, cat, cat, NOTHING, NOTHING, IGNORED, IGNORED]
    assert label[3].tolist() == [cat, cat, cat, cat, NOTHING, NOTHING, IGNORED, IGNORED]


def test_an_image_may_have_no_objects(tmp_path: Path) -> None:
    assert (np.asarray(make(tmp_path)[1][1]) == NOTHING).all()


def test_missing_images_are_named(tmp_path: Path) -> None:
    images = [*CONTENT["images"], {"id": 9, "file_name": "gone.png", "height": 4, "width": 8}]
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images of .* are not in .*photos: gone.png"):
        make(tmp_path, images=images)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no categories": ({"categories": []}, "has 0 categories"),
    "unknown category": ({"categories": CONTENT["categories"][:1]}, "unknown categories: ids 5"),
    "unknown image": ({"images": CONTENT["images"][1:]}, "images that it does not list: ids 7"),
    "another format": ({"images": [{"id": 1}]}, "not a file of COCO instances .*expected `images` with"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(name: str, tmp_path: Path) -> None:
    changes, match = BROKEN[name]
    with pytest.raises(ValueError, match=match):
        make(tmp_path, **changes)


def test_masks_and_images_of_other_sizes_are_refused(tmp_path: Path) -> None:
    dataset = make(tmp_path, images=[{**image, "width": 9} for image in CONTENT["images"]])
    with pytest.raises(ValueError, match="annotation 3, .*a.png: .*its size is"):
        dataset[0]
    with pytest.raises(ValueError, match="b.png has 8 x 4 pixels .*annotations say 9 x 4"):
        dataset[1]
