"""Files and names of a checkpoint directory: temporary names, atomic replacement, checksums."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import zlib
from pathlib import Path

ITERATION = re.compile(r"0|[1-9][0-9]*")
TEMPORARY = re.compile(r"\.tmp-(?P<name>.+)-[0-9a-f]{8}(?P<is_old>\.old)?")
CHUNK = 2**22


def temporary_beside(target: Path) -> Path:
    """A new name beside `target` that no reader takes for a checkpoint."""
    return target.with_name(f".tmp-{target.name}-{secrets.token_hex(4)}")


def publish(temporary: Path, target: Path) -> None:
    """Give the complete directory `temporary` its name, replacing an older directory, safe against a crash."""
    old = temporary.with_name(temporary.name + ".old")
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    fsync(target.parent)
    if old.exists():
        shutil.rmtree(old)


def remove(directory: Path) -> None:
    """Delete a directory so that a crash leaves no half of it under its name."""
    doomed = temporary_beside(directory)
    try:
        directory.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed)


def remove_stale_temporaries(root: str | os.PathLike[str]) -> None:
    """Clean up after crashes while saving, copying or deleting checkpoints in `root`.

    Only for the one process that holds the run's lock: temporary directories of a save in progress go too.

    Args:
        root: a directory of checkpoints; nothing happens if it does not exist.
    """
    if not Path(root).is_dir():
        return
    for entry in Path(root).iterdir():
        match = TEMPORARY.fullmatch(entry.name)
        if match is None:
            continue
        target = entry.with_name(match["name"])
        if match["is_old"] and not target.exists():
            # The crash came between renaming the old directory away and giving the new one its name.
            entry.rename(target)
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32(path: Path) -> str:
    """Checksum of a file, eight hexadecimal digits."""
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"
