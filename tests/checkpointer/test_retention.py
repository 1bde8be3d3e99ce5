"""Which checkpoints there are and which stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dinov3.checkpointer import (
    CheckpointRetentionPolicy,
    cleanup_checkpoint,
    find_all_checkpoints,
    find_latest_checkpoint,
    keep_checkpoint_copy,
    keep_last_n_checkpoints,
    run_directory,
)


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir()
        (root / name / "data").write_text(name)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_only_plain_iteration_numbers_are_checkpoints(tmp_path: Path) -> None:
    make(
        tmp_path, "0", "7", "10", "-5", "1_000", "007", "\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT THREE}", "7_keep"
    )
    make(tmp_path, "7.corrupt", ".tmp-8-01234567", "19abcdefgh", " 3")
    (tmp_path / "11").touch()
    assert [path.name for path in find_all_checkpoints(tmp_path)] == ["0", "7", "10"]
    assert find_latest_checkpoint(tmp_path) == tmp_path / "10"
    assert find_all_checkpoints(tmp_path / "absent") == [] and find_latest_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("n, left", [(None, ["10", "2", "9"]), (5, ["10", "2", "9"]), (1, ["10"]), (0, [])])
def test_newest_checkpoints_stay(tmp_path: Path, n: int | None, left: list[str]) -> None:
    make(tmp_path, "2", "9", "10", "9_keep")
    keep_last_n_checkpoints(tmp_path, n)
    assert names(tmp_path) == [*left, "9_keep"]
    keep_last_n_checkpoints(tmp_path / "absent", n)


def test_negative_number_to_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot keep -1 checkpoints"):
        keep_last_n_checkpoints(tmp_path, -1)


def test_kept_copy_shares_the_files_and_survives_pruning(tmp_path: Path) -> None:
    make(tmp_path, "199")
    copy = keep_checkpoint_copy(tmp_path / "199")
    assert copy == tmp_path / "199_keep" and os.path.samefile(copy / "data", tmp_path / "199" / "data")
    (tmp_path / "199" / "more").touch()
    keep_checkpoint_copy(str(tmp_path / "199"))
    assert names(copy) == ["data", "more"] and names(tmp_path) == ["199", "199_keep"]
    keep_last_n_checkpoints(tmp_path, 0)
    assert (copy / "data").read_text() == "199"


def test_copy_is_made_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(run_directory.os, "link", refuse)
    make(tmp_path, "1")
    assert (keep_checkpoint_copy(tmp_path / "1") / "data").read_text() == "1"


EVERYTHING = ["0", "20", "best", "final", "20_keep", "notes"]
LEFT = {
    "all": EVERYTHING,
    "best": ["best", "20_keep", "notes"],
    "last": ["final", "20_keep", "notes"],
    "last_and_best": ["best", "final", "20_keep", "notes"],
    "none": ["20_keep", "notes"],
}


@pytest.mark.parametrize("policy", LEFT)
def test_policy_keeps_what_it_names(tmp_path: Path, policy: str) -> None:
    make(tmp_path, *EVERYTHING)
    cleanup_checkpoint(tmp_path, CheckpointRetentionPolicy(policy))
    assert names(tmp_path) == sorted(LEFT[policy])
    cleanup_checkpoint(tmp_path / "absent", CheckpointRetentionPolicy(policy))


def test_policy_says_how_many_to_keep_while_training() -> None:
    numbers = {policy.value: policy.max_to_keep for policy in CheckpointRetentionPolicy}
    assert numbers == {"all": None, "best": 1, "last": 1, "last_and_best": 1, "none": 1}
