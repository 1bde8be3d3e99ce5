"""Files and directories that are written completely or not at all, and disks that are full."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_FULL = (errno.ENOSPC, errno.EDQUOT)
#: With less, a disk counts as full when torch fails to write, for it does not pass on what the system said.
_LITTLE_SPACE = 2**20


class DiskFullError(OSError):
    """A disk is full, or a quota is used up; the message names the directory and what is free.

    Made like any OSError, of a number and a message; only the message is shown.
    """

    def __str__(self) -> str:
        return str(self.strerror)


@contextlib.contextmanager
def explaining_full_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an error in the body into a `DiskFullError` if it means that `path` could not be written for lack of space.

    Args:
        path: the file or directory that the body writes; its parent directory exists.
    """
    try:
        yield
    except (DiskFullError, SystemExit, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # torch's CheckpointException is one
        directory = Path(path).absolute().parent
        if not _is_for_lack_of_space(error, directory):
            raise
        free = shutil.disk_usage(directory).free
        raise DiskFullError(
            errno.ENOSPC,
            f"No space left on device for {path}: {directory} has {free / 2**30:.2f} GiB free"
            + (", but perhaps a smaller quota" if free > _LITTLE_SPACE else "")
            + "; make room, or choose a directory on another disk",
        ) from error


def _is_for_lack_of_space(error: BaseException | None, directory: Path) -> bool:
    if isinstance(error, RuntimeError) and shutil.disk_usage(directory).free < _LITTLE_SPACE:
        return True
    while error is not None:
        # The latter are the errors of all ranks in torch's CheckpointException.
        failures = [cause for cause, _ in getattr(error, "failures", {}).values()]
        if getattr(error, "errno", None) in _FULL or any(_is_for_lack_of_space(cause, directory) for cause in failures):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike[str], mode: str = "wb", *, errors: str = "backslashreplace"
) -> Iterator[IO[Any]]:
    """Open a file that takes the name `path` once it is complete and on the disk.

    Readers see the old file or the new one, never a part: the content goes to a temporary file beside it, which
    replaces `path` when the context ends, and is deleted when the context raises. Missing directories are created.

    Args:
        path: the file to create or replace.
        mode: "wb", or "w" for UTF-8 text.
        errors: what becomes of characters that UTF-8 does not have, which file names may contain; `surrogateescape`
            keeps such names.

    Raises:
        DiskFullError: there is no space left for it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "errors": errors}
    try:
        with explaining_full_disk(path), open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_beside(target: Path) -> Path:
    """Return an unused hidden name in the directory of `target`, so that renaming it to `target` is atomic."""
    return target.with_name(f".tmp-{target.name}-{secrets.token_hex(4)}")


def publish_directory(temporary: Path, target: Path) -> None:
    """Rename a complete directory to `target`, replacing an older directory so that a crash loses neither."""
    # POSIX cannot replace a directory that holds files, so the old one steps aside under a name that tells cleaners
    # (`checkpointer.remove_stale_temporaries`) to put it back if the crash comes between the two renames.
    old = temporary.with_name(temporary.name + ".old")
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    fsync(target.parent)
    if old.exists():
        shutil.rmtree(old)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    if sys.platform == "win32":  # where neither can be opened like this
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
