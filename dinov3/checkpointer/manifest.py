"""`checkpoint.json`, the last file of a checkpoint: which files belong to it, with sizes and checksums.

torch.distributed.checkpoint notices missing and truncated files when it loads, but not a flipped bit.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed import ProcessGroup

from dinov3.checkpointer.dcp import INDEX, CheckpointError, read_metadata, run_on_all, run_on_main
from dinov3.checkpointer.run_directory import find_all_checkpoints
from dinov3.distributed import get_process_subgroup, get_rank, get_world_size
from dinov3.utils.files import atomic_write, fsync

logger = logging.getLogger("dinov3")

MANIFEST = "checkpoint.json"
FORMAT_VERSION = 1
#: Up to this size `verify="auto"` compares checksums.
AUTO_VERIFY_BYTES = 8 * 10**9

Verify = bool | Literal["auto"]


def write_manifest(
    directory: Path,
    *,
    iteration: int,
    world_size: int,
    digests: dict[str, dict[str, Any]],
    contents: list[str],
    metadata: dict[str, Any],
) -> None:
    """Write the manifest of a directory whose other files are complete, and wait until it is on the disk."""
    manifest = {
        "format": FORMAT_VERSION,
        "iteration": iteration,
        "world_size": world_size,
        "torch": torch.__version__,
        "contents": contents,
        "files": dict(sorted(digests.items())),
        "metadata": metadata,
    }
    with atomic_write(directory / MANIFEST, "w") as file:
        file.write(json.dumps(manifest, indent=2) + "\n")
    fsync(directory)  # the names of all files, before the directory itself is renamed


def digest_file(path: Path) -> dict[str, Any]:
    """Return the size and the checksum (CRC-32, eight hexadecimal digits) of a file, as the manifest holds them."""
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": path.stat().st_size, "crc32": f"{checksum:08x}"}


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Returns:
        `format`, `iteration`, `world_size`, `torch` (its version), `contents` (names of the top entries), `files`
        (`bytes` and `crc32` by name) and `metadata` (what `save_checkpoint` was given).

    Raises:
        CheckpointError: it is missing or damaged, or a newer version of this library wrote it.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, but this version of dinov3 reads format {FORMAT_VERSION}: update dinov3"
        )
    return manifest


def check_files(directory: Path, verify: Verify, group: ProcessGroup | None) -> None:
    """Compare the files of a checkpoint with its manifest; the ranks share the work.

    Args:
        directory: the checkpoint. Without a manifest (official release) only its index and sizes are checked.
        verify: compare checksums too; `"auto"`: below 8 GB. Sizes are always compared.
        group: the processes that call this.

    Raises:
        CheckpointError: something is missing or damaged, on all ranks.
    """
    run_on_all(group, lambda: _check_share(directory, verify, get_rank(group), get_world_size(group)))


def latest_valid_checkpoint(
    root: str | os.PathLike[str], *, verify: Verify = "auto", not_after: int | None = None
) -> Path | None:
    """Find the newest undamaged checkpoint in `root`, and rename newer, damaged ones to `<iteration>.corrupt`.

    All ranks of the subgroup call it and share the work.

    Args:
        root: directory of checkpoints with integer names.
        verify: compare checksums (`"auto"`: below 8 GB each); sizes are always compared.
        not_after: the newest iteration to consider. Default: any.

    Returns:
        The checkpoint; None if there is none at all.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged; none of them is renamed.
    """
    group = get_process_subgroup()
    damaged: dict[Path, str] = {}
    for directory in reversed(run_on_main(group, lambda: find_all_checkpoints(root))):
        if not_after is not None and int(directory.name) > not_after:
            continue
        try:
            check_files(directory, verify, group)
        except CheckpointError as error:
            logger.error("checkpoint %s is damaged: %s", directory, error)
            damaged[directory] = str(error)
            continue
        # Only now: as long as nothing better is found, the damaged ones are all that the user has.
        run_on_main(group, lambda: _set_aside(list(damaged)))
        return directory
    if damaged:
        reasons = "\n".join(f"  {reason}" for reason in damaged.values())
        raise CheckpointError(
            f"no undamaged checkpoint is left in {root}:\n{reasons}\nRestore one, or move them away to start over."
        )
    return None


def check_is_checkpoint(directory: Path) -> None:
    """Raise a CheckpointError unless `directory`, as a user gave it, is a checkpoint; it names one that lies below."""
    if not directory.exists():
        raise CheckpointError(f"{directory} does not exist")
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; expected the directory of a checkpoint, e.g. RUN/ckpt/9999")
    if any((directory / name).exists() for name in (MANIFEST, INDEX)):
        return
    subdirectories = [directory, *sorted(path for path in directory.iterdir() if path.is_dir())]
    newest = next((found[-1] for root in subdirectories if (found := find_all_checkpoints(root))), None)
    if newest is not None:
        raise CheckpointError(f"{directory} is not a checkpoint; the newest one below it is {newest}")
    raise CheckpointError(f"{directory} is not a checkpoint: it has neither {MANIFEST} nor {INDEX}")


def _check_share(directory: Path, verify: Verify, rank: int, world_size: int) -> None:
    if not (directory / MANIFEST).exists():
        return _check_without_manifest(directory)
    listed: dict[str, dict[str, Any]] = read_manifest(directory)["files"]
    wants_checksums = verify is True or (
        verify == "auto" and sum(entry["bytes"] for entry in listed.values()) <= AUTO_VERIFY_BYTES
    )
    for number, (name, entry) in enumerate(listed.items()):
        path = directory / name
        _check_size(path, entry["bytes"], entry["bytes"])
        if wants_checksums and number % world_size == rank and digest_file(path)["crc32"] != entry["crc32"]:
            raise CheckpointError(f"{path} has a different checksum than when it was written")


def _check_without_manifest(directory: Path) -> None:
    if not (directory / INDEX).is_file():
        raise CheckpointError(f"{directory} has neither {MANIFEST} nor {INDEX}: its save was interrupted")
    needed: dict[str, int] = {}
    for storage in read_metadata(directory).storage_data.values():
        needed[storage.relative_path] = max(needed.get(storage.relative_path, 0), storage.offset + storage.length)
    for name, size in needed.items():
        _check_size(directory / name, size)


def _check_size(path: Path, least: int, most: int | None = None) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    size = path.stat().st_size
    if size < least or (most is not None and size > most):
        raise CheckpointError(f"{path} has {size} bytes, but should have {least}{'' if most else ' or more'}")


def _set_aside(directories: list[Path]) -> None:
    for directory in directories:
        names = (f"{directory.name}.corrupt{number}" for number in itertools.count(2))
        aside = directory.with_name(f"{directory.name}.corrupt")
        while aside.exists():
            aside = directory.with_name(next(names))
        directory.rename(aside)
        logger.warning("kept the damaged checkpoint as %s", aside)
