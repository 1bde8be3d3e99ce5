"""Files and directories that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


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
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "errors": errors}
        with open(temporary, mode, **text) as file:
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
