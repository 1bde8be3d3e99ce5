"""Finding the newest checkpoint that is not damaged."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dinov3.checkpointer import (
    CheckpointError,
    latest_valid_checkpoint,
    load_checkpoint,
    manifest,
    read_manifest,
    save_checkpoint,
)

from . import toy


def truncate(directory: Path) -> None:
    path = toy.data_file(directory)
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(directory: Path) -> None:
    path = toy.data_file(directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_index(directory: Path) -> None:
    (directory / ".metadata").unlink()


def empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def spoil_manifest(directory: Path) -> None:
    path = directory / "checkpoint.json"
    path.write_text(path.read_text()[:40])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated file": (truncate, r"\.distcp has \d+ bytes, but should have \d+"),
    "flipped bit": (flip_a_bit, r"\.distcp has a different checksum"),
    "no index": (remove_index, r"\.metadata is missing"),
    "no checkpoint": (empty, r"neither checkpoint\.json nor \.metadata"),
    "torn manifest": (spoil_manifest, r"checkpoint\.json cannot be read"),
}


def save_three(root: Path) -> None:
    for iteration in (9, 19, 100):
        save_checkpoint(root / str(iteration), iteration=iteration, model=toy.make(seed=iteration)[0])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_set_aside_for_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_three(tmp_path)
    assert latest_valid_checkpoint(tmp_path) == tmp_path / "100"
    spoil, message = DAMAGES[damage]
    spoil(tmp_path / "100")
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        assert latest_valid_checkpoint(tmp_path) == tmp_path / "19"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100.corrupt", "19", "9"]
    assert re.search(message, caplog.text)
    assert latest_valid_checkpoint(tmp_path) == tmp_path / "19"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_not_loaded(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path / "1", iteration=1, model=toy.make(seed=0)[0])
    spoil, message = DAMAGES[damage]
    spoil(tmp_path / "1")
    model = toy.make(seed=1)[0]
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "1", model=model)
    toy.assert_equal(model.state_dict(), toy.make(seed=1)[0].state_dict())


def test_damage_is_an_error_when_nothing_good_is_left(tmp_path: Path) -> None:
    save_three(tmp_path)
    for spoil, name in ((truncate, "9"), (flip_a_bit, "19"), (remove_index, "100")):
        spoil(tmp_path / name)
    with pytest.raises(CheckpointError, match="no undamaged checkpoint is left") as caught:
        latest_valid_checkpoint(tmp_path)
    for word in ("checksum", "is missing", "should have", "move them away to start over"):
        assert word in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100", "19", "9"]


def test_nothing_saved_is_no_error(tmp_path: Path) -> None:
    assert latest_valid_checkpoint(tmp_path) is None
    assert latest_valid_checkpoint(tmp_path / "absent") is None


def test_second_damaged_checkpoint_of_an_iteration_gets_its_own_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "1", iteration=1, model=toy.make()[0])
    for names in (["1", "5.corrupt"], ["1", "5.corrupt", "5.corrupt2"], ["1", "5.corrupt", "5.corrupt2", "5.corrupt3"]):
        (tmp_path / "5").mkdir()
        assert latest_valid_checkpoint(tmp_path) == tmp_path / "1"
        assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_checksums_are_compared_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_three(tmp_path)
    flip_a_bit(tmp_path / "100")
    assert latest_valid_checkpoint(tmp_path, verify=False) == tmp_path / "100"
    monkeypatch.setattr(manifest, "AUTO_VERIFY_BYTES", 1000)  # this checkpoint is larger
    assert latest_valid_checkpoint(tmp_path, verify="auto") == tmp_path / "100"
    assert latest_valid_checkpoint(tmp_path, verify=True) == tmp_path / "19"


def test_official_checkpoint_without_a_manifest_is_taken_if_its_files_are_whole(tmp_path: Path) -> None:
    model = toy.make(seed=0)[0]
    for iteration in (1, 2):
        save_checkpoint(tmp_path / str(iteration), iteration=iteration, model=model)
        (tmp_path / str(iteration) / "checkpoint.json").unlink()
    assert latest_valid_checkpoint(tmp_path) == tmp_path / "2"
    truncate(tmp_path / "2")
    assert latest_valid_checkpoint(tmp_path) == tmp_path / "1"
    loaded = toy.make(seed=1)[0]
    assert load_checkpoint(tmp_path / "1", model=loaded) == 1
    toy.assert_equal(loaded.state_dict(), model.state_dict())
    toy.data_file(tmp_path / "1").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_checkpoint(tmp_path / "1", model=loaded)


def test_damaged_index_is_reported(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match=r"\.metadata is not the index of a distributed checkpoint"):
        load_checkpoint(tmp_path / "1", model=toy.make()[0])


def test_manifest_of_a_newer_format_asks_for_an_update(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "1", iteration=1, model=toy.make()[0])
    path = tmp_path / "1" / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(CheckpointError, match="has format 2, but this version of dinov3 reads format 1: update dinov3"):
        read_manifest(tmp_path / "1")
