"""Datasets that are not the same on all ranks, or not what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dinov3.data.datasets import ImageFolder
from dinov3.data.fingerprint import N_DIGESTED, check_same_on_all_ranks, fingerprint
from tests.multiprocess import run_ranks


class Names(list[str]):
    def get_image_relpath(self, index: int) -> str:
        return self[index]


def test_a_name_more_less_or_changed_is_noticed() -> None:
    names = [f"{number}.png" for number in range(100)]
    assert fingerprint(Names(names)) == fingerprint(Names(names))
    others = [names[1:], [*names, "x.png"], ["x.png", *names[1:]], [*names[:50], "x.png", *names[51:]], names[::-1]]
    assert len({fingerprint(Names(one)) for one in [names, *others]}) == 6


def test_of_many_names_a_part_is_digested_in_which_a_shift_shows() -> None:
    names = [str(number) for number in range(3 * N_DIGESTED)]
    asked: list[int] = []

    class Counting(Names):
        def get_image_relpath(self, index: int) -> str:
            asked.append(index)
            return self[index]

    before = fingerprint(Counting(names))
    assert len(asked) == N_DIGESTED and (asked[0], asked[-1]) == (0, len(names) - 1)
    shifted = [*names[:1000], "new", *names[1000:-1]]
    assert fingerprint(Names(shifted)).n_images == before.n_images
    assert fingerprint(Names(shifted)).names != before.names


@pytest.mark.parametrize("content", [[], [1, 2, 3]])
def test_datasets_without_names_or_images_have_a_length(content: list[int]) -> None:
    assert fingerprint(content) == (len(content), "")
    assert fingerprint(Names(["a"] * len(content))).n_images == len(content)


def test_names_of_any_bytes_can_be_digested() -> None:
    assert fingerprint(Names(["caf\udce9.png"])) != fingerprint(Names(["café.png"]))


def compare(rank: int, world_size: int, names: list[list[str]]) -> str:
    try:
        return str(check_same_on_all_ranks(Names(names[rank]), "train.dataset_path"))
    except ValueError as error:
        return str(error)


def test_ranks_refuse_different_data_with_all_counts(tmp_path: Path) -> None:
    for message in run_ranks(compare, 2, [["a", "b", "c"], ["a", "c"]]):
        assert "train.dataset_path is not the same on all ranks: 3 images on rank 0 (" in message
        assert "2 images on rank 1 (" in message


def test_one_process_compares_nothing(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    dataset: Any = ImageFolder(root=str(tmp_path))
    assert check_same_on_all_ranks(dataset, "x") == fingerprint(dataset)
