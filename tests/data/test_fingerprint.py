"""Datasets that are not the same on all ranks, or not what they were."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dinov3.data.datasets import ImageFolder
from dinov3.data.fingerprint import N_DIGESTED, DataFingerprint, check_same_on_all_ranks, fingerprint
from dinov3.eval.classification.data import open_dataset
from dinov3.eval.dense.config import DatasetsConfig
from dinov3.eval.dense.data import make_paired_dataset
from tests.multiprocess import run_ranks
from tests.train import tiny


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


def pretend_that_rank_1_has_one_image_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(own: Any, group: Any) -> list[Any]:
        (n_images, names), host = own
        return [own, (DataFingerprint(n_images - 1, names), "node2")]

    ranks = SimpleNamespace(get_default_process_group=lambda: None, all_gather_objects=gather)
    monkeypatch.setattr("dinov3.data.fingerprint.distributed", ranks)


def test_evaluations_and_training_compare_their_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("a/1", "b/2", "b/3")):
        for path, mode in ((tmp_path / "images", "RGB"), (tmp_path / "labels", "L")):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (4, 4), number).save(path / f"{name}.png")
    trainer = tiny.make_trainer(tmp_path / "run", period=6)
    pretend_that_rank_1_has_one_image_less(monkeypatch)
    with pytest.raises(
        ValueError, match=r"train\.dataset is not the same on all ranks: 3 images .*; 2 images on rank 1"
    ):
        open_dataset(f"ImageFolder:root={tmp_path}/images", None, "train.dataset")
    config = DatasetsConfig(root=str(tmp_path), train="SegmentationFolder", val="")
    with pytest.raises(ValueError, match=r"datasets\.train=SegmentationFolder is not the same on all ranks"):
        make_paired_dataset(config, "train", None)
    with pytest.raises(ValueError, match=r"train\.dataset_path is not the same on all ranks: 12 images on rank 0"):
        trainer.run()


def test_one_process_compares_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    dataset: Any = ImageFolder(root=str(tmp_path))
    assert check_same_on_all_ranks(dataset, "x") == fingerprint(dataset)
