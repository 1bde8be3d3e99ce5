"""Re-assessed labels and corrupted images of ImageNet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3.data import make_dataset


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


@pytest.fixture
def real(tmp_path: Path) -> Path:
    for number, folder in ((3, "n01"), (1, "n02"), (2, "n01")):
        write(tmp_path / "val" / folder / f"ILSVRC2012_val_{number:08d}.JPEG")
    (tmp_path / "real.json").write_text(json.dumps([[5, 7], [], [2]]))
    return tmp_path


def test_labels_belong_to_the_numbers_of_the_images(real: Path) -> None:
    dataset = make_dataset(dataset_str=f"ImageNetReaL:root={real}/val:labels={real}/real.json")
    found = {dataset.get_image_relpath(i)[-6]: dataset[i][1] for i in range(3)}
    assert found == {"1": [5, 7], "2": [], "3": [2]}
    assert dataset.get_targets() == [dataset.get_target(i) for i in range(3)]


@pytest.mark.parametrize(
    "text, message", [("[[1]]", "image number 3, but .* has 1"), ("{", "is not JSON"), ("[1, 2, 3]", "list of lists")]
)
def test_labels_that_do_not_fit(text: str, message: str, real: Path) -> None:
    (real / "real.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        make_dataset(dataset_str=f"ImageNetReaL:root={real}/val:labels={real}/real.json")


def test_labels_or_images_that_are_missing(real: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"labels=.*nowhere\.json"):
        make_dataset(dataset_str=f"ImageNetReaL:root={real}/val:labels={real}/nowhere.json")
    with pytest.raises(FileNotFoundError, match="not a directory"):
        make_dataset(dataset_str=f"ImageNetC:root={real}/nowhere")
    write(real / "val" / "n01" / "other.JPEG")
    with pytest.raises(ValueError, match="other.JPEG is not named like"):
        make_dataset(dataset_str=f"ImageNetReaL:root={real}/val:labels={real}/real.json")


def test_corruptions_and_levels_are_those_of_the_folders(tmp_path: Path) -> None:
    for name in ("weather/fog/1/n01/a.JPEG", "weather/fog/5/n02/a.JPEG", "blur/zoom_blur/2/n02/a.JPEG"):
        write(tmp_path / name)
    dataset = make_dataset(dataset_str=f"ImageNetC:root={tmp_path}")
    rows = {dataset.get_image_relpath(i): dataset[i][1].tolist() for i in range(3)}
    assert rows == {
        "blur/zoom_blur/2/n02/a.JPEG": [1, 1, 2],
        "weather/fog/1/n01/a.JPEG": [0, 0, 1],
        "weather/fog/5/n02/a.JPEG": [1, 0, 5],
    }
    assert dataset.corruption_types == ["fog", "zoom_blur"]
    assert np.array_equal(dataset.get_targets(), np.stack([dataset.get_target(i) for i in range(3)]))


def test_images_in_no_level_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "fog" / "9" / "n01" / "a.JPEG")
    with pytest.raises(ValueError, match="is not named like fog/1"):
        make_dataset(dataset_str=f"ImageNetC:root={tmp_path}")
