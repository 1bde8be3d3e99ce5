"""One run per directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinov3.checkpointer import RunLock, run_directory

REPOSITORY = Path(__file__).parents[2]
HOLD = """
import sys, time
from dinov3.checkpointer import RunLock
with RunLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_second_run_is_told_who_holds_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.distributed
def test_lock_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(RuntimeError, match=f"process {holder.pid} on"):
            RunLock(tmp_path).__enter__()
    finally:
        holder.kill()
        holder.communicate()
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
