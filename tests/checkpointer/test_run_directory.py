"""Which checkpoints a run has, which stay, and its lock."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from dinov3.checkpointer import (
    CheckpointRetentionPolicy,
    RunLock,
    cleanup_checkpoint,
    find_all_checkpoints,
    find_latest_checkpoint,
    keep_checkpoint_copy,
    keep_last_n_checkpoints,
    run_directory,
)
from tests.multiprocess import start


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


def test_second_run_learns_who_holds_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with RunLock(tmp_path / "run"):
        with pytest.raises(RuntimeError, match=rf"process {os.getpid()} on .*, job SLURM_JOB_ID=4711, since 20"):
            RunLock(tmp_path / "run").__enter__()
        with RunLock(tmp_path / "other"):
            pass
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "run" / ".lock").read_text() == ""


def test_error_inside_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    with RunLock(tmp_path):
        pass


def hold(directory: Path) -> None:
    with RunLock(directory):
        print("locked", flush=True)
        time.sleep(60)


@pytest.mark.distributed
def test_lock_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    holder = start(hold, tmp_path, output=said)
    try:
        while not (said.exists() and said.read_text() == "locked\n"):
            assert holder.is_alive()
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match=f"process {holder.pid} on"):
            RunLock(tmp_path).__enter__()
    finally:
        holder.kill()
        holder.join()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == holder.pid
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    holder = RunLock(tmp_path)
    holder.__enter__()
    to_parent, to_child = os.pipe(), os.pipe()
    if (worker := os.fork()) == 0:
        os.write(to_parent[1], b"x")
        os.read(to_child[0], 1)
        os._exit(0)
    os.read(to_parent[0], 1)
    try:
        # What the system does when the holder is killed: it closes its files, without unlocking them by hand.
        holder._close()
        with RunLock(tmp_path):
            pass
    finally:
        os.write(to_child[1], b"x")
        os.waitpid(worker, 0)
        for descriptor in (*to_parent, *to_child):
            os.close(descriptor)


def test_file_system_without_locks_gets_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(run_directory.fcntl, "flock", refuse)
    with RunLock(tmp_path):
        assert "cannot be locked (no locks available)" in caplog.text


def test_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="file/run cannot be written to .*choose another --output-dir"):
        RunLock(tmp_path / "file" / "run").__enter__()
