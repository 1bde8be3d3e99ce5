"""Atomic files and directories."""

from __future__ import annotations

import errno
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dinov3.utils.files import (
    DiskFullError,
    atomic_write,
    explaining_full_disk,
    publish_directory,
    temporary_beside,
)


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    with atomic_write(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_text_is_utf_8(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt", "w") as file:
        file.write("µ ± σ\n")
    assert (tmp_path / "a.txt").read_bytes() == "µ ± σ\n".encode()


@pytest.mark.parametrize("error", [ValueError("stop"), OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_write(path, "w") as file:
        file.write("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


class FullDisk:
    """A file that has room for some bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def test_a_full_disk_is_named_with_what_is_free(tmp_path: Path) -> None:
    free = rf"No space left on device for {tmp_path}/a\.pth: {tmp_path} has \d+\.\d\d GiB free"
    with pytest.raises(DiskFullError, match=free), atomic_write(tmp_path / "a.pth") as file:
        raise OSError(errno.ENOSPC, "No space left on device")
    # Torch reports a failed assertion of its own.
    with pytest.raises(DiskFullError, match=free), atomic_write(tmp_path / "a.pth") as file:
        torch.save({"weights": torch.zeros(10_000)}, FullDisk(file, 1000))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    error = pickle.loads(pickle.dumps(DiskFullError(errno.ENOSPC, "No space left")))  # as it comes from another process
    assert str(error) == error.strerror == "No space left" and error.errno == errno.ENOSPC


def test_a_failure_of_torch_on_a_disk_without_space_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(DiskFullError, match=r"has 0\.00 GiB free; make room"), explaining_full_disk(tmp_path / "a"):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")
    with pytest.raises(ValueError, match="bad"), explaining_full_disk(tmp_path / "a"):
        raise ValueError("bad")


@pytest.mark.parametrize("error", [SystemExit(75), KeyboardInterrupt()])
def test_what_ends_a_process_is_not_explained(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, explaining_full_disk(tmp_path / "a"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise error  # noqa: B904
    assert caught.value is error


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (OSError(errno.EACCES, "denied"), RuntimeError("x"), DiskFullError(errno.ENOSPC, "already")):
        with pytest.raises(type(error)) as caught, explaining_full_disk(tmp_path / "a"):
            raise error
        assert caught.value is error


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    with atomic_write(tmp_path / "atomic", "w") as file:
        file.write("x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_directory_replaces_an_older_one(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    target.mkdir()
    (target / "old").touch()
    temporary = temporary_beside(target)
    temporary.mkdir()
    (temporary / "new").touch()
    publish_directory(temporary, target)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]
