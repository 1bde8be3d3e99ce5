"""Atomic files and directories."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dinov3.utils.files import atomic_write, publish_directory, temporary_beside


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
