"""Targets that carry the index of their sample."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from PIL import Image

from dinov3.data import DatasetWithEnumeratedTargets
from dinov3.data.datasets import ImageFolder


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    for number in range(3):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    return ImageFolder(root=str(tmp_path))


def test_padding_repeats_the_first_samples_without_an_index(folder: ImageFolder) -> None:
    padded = DatasetWithEnumeratedTargets(folder, pad_dataset=True, num_replicas=5)
    assert len(padded) == 5
    assert [padded[index][1] for index in range(5)] == [(0, 0), (1, 0), (2, 1), (-1, 0), (-1, 0)]
    assert padded[4][0].getpixel((0, 0)) == padded[1][0].getpixel((0, 0))


def test_what_belongs_to_a_sample_is_forwarded_for_padding_too(folder: ImageFolder) -> None:
    padded = DatasetWithEnumeratedTargets(folder, pad_dataset=True, num_replicas=5)
    assert padded.get_target(2) == (2, 1) and padded.get_target(3) == (-1, 0)
    assert padded.get_image_relpath(2) == "b/1.png"
    assert padded.get_image_relpath(4) == folder.get_image_relpath(1)


@pytest.mark.parametrize("index", [3, 4, -1])
def test_index_out_of_range_is_an_index_error(folder: ImageFolder, index: int) -> None:
    enumerated = DatasetWithEnumeratedTargets(folder)
    for access in (enumerated.__getitem__, enumerated.get_target, enumerated.get_image_relpath):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 3 samples"):
            access(index)


def test_iteration_ends(folder: ImageFolder) -> None:
    assert len(list(DatasetWithEnumeratedTargets(folder))) == 3


@pytest.mark.parametrize("num_replicas", [None, 0])
def test_padding_needs_the_number_of_processes(folder: ImageFolder, num_replicas: int | None) -> None:
    with pytest.raises(ValueError, match=f"num_replicas of at least 1, got {num_replicas}"):
        DatasetWithEnumeratedTargets(folder, pad_dataset=True, num_replicas=num_replicas)


def test_an_empty_dataset_cannot_be_padded() -> None:
    with pytest.raises(ValueError, match="empty"):
        DatasetWithEnumeratedTargets([], pad_dataset=True, num_replicas=2)


def test_it_can_be_pickled(folder: ImageFolder) -> None:
    enumerated = DatasetWithEnumeratedTargets(folder, pad_dataset=True, num_replicas=2)
    assert pickle.loads(pickle.dumps(enumerated)).get_target(3) == (-1, 0)
