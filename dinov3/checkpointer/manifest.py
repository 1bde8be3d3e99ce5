"""`checkpoint.json`, the last file of a checkpoint: what belongs to it, with sizes and checksums.

torch.distributed.checkpoint notices missing and truncated files when loading, but not a flipped bit; the manifest does.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import Metadata

from dinov3.checkpointer import files
from dinov3.checkpointer.agreement import CheckpointError, on_all, on_main
from dinov3.checkpointer.retention import find_all_checkpoints
from dinov3.checkpointer.unpickling import SafeReader
from dinov3.distributed import get_process_subgroup, get_rank, get_world_size

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
    path = directory / MANIFEST
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    files.fsync(path)
    files.fsync(directory)


def digest_of(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, as the manifest holds them."""
    return {"bytes": path.stat().st_size, "crc32": files.crc32(path)}


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Args:
        directory: the checkpoint.

    Returns:
        `format`, `iteration`, `world_size`, `torch` (its version), `contents` (names of the top entries), `files`
        (`bytes` and `crc32` by name) and `metadata` (what `save_checkpoint` was given).

    Raises:
        CheckpointError: there is none, it is damaged, or a newer version of this library wrote it.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {version}, this version of dinov3 reads {FORMAT_VERSION}: update it")
    return manifest


def read_metadata(directory: Path) -> Metadata:
    """The index of a torch.distributed.checkpoint directory.

    Raises:
        CheckpointError: there is none, it is damaged, or it could run code.
    """
    try:
        return SafeReader(directory).read_metadata()
    except OSError as error:
        raise CheckpointError(f"{directory}/.metadata cannot be read: {type(error).__name__}: {error}") from error
    except Exception as error:
        raise CheckpointError(
            f"{directory}/.metadata is not the index of a distributed checkpoint, or is damaged: {error}"
        ) from error


def check_files(directory: Path, verify: Verify, group: ProcessGroup | None) -> None:
    """Compare a checkpoint's files with its manifest; the ranks share the work.

    Args:
        directory: the checkpoint; without a manifest (official release), only its index and sizes are looked at.
        verify: compare checksums too; `"auto"`: below 8 GB. Sizes are always compared.
        group: the processes that call this.

    Raises:
        CheckpointError: something is missing or damaged, on all ranks.
    """
    on_all(group, lambda: _check_share(directory, verify, get_rank(group), get_world_size(group)))


def latest_valid_checkpoint(
    root: str | os.PathLike[str],
    *,
    verify: Verify = "auto",
    not_after: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Path | None:
    """The newest undamaged checkpoint in `root`; newer ones that are damaged are renamed to `<iteration>.corrupt`.

    Args:
        root: directory of checkpoints with integer names.
        verify: compare checksums (`"auto"`: below 8 GB each); sizes are always compared.
        not_after: the newest iteration that may be chosen; None: any.
        process_group: processes that call this, by default the subgroup of this process; they share the work.

    Returns:
        The checkpoint; None if there is none at all.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged; none of them is renamed.
    """
    group = process_group or get_process_subgroup()
    damaged: dict[Path, str] = {}
    for directory in reversed(on_main(group, lambda: find_all_checkpoints(root))):
        if not_after is not None and int(directory.name) > not_after:
            continue
        try:
            check_files(directory, verify, group)
        except CheckpointError as error:
            logger.error("checkpoint %s is damaged: %s", directory, error)
            damaged[directory] = str(error)
            continue
        on_main(group, lambda: _set_aside(list(damaged)))
        return directory
    if damaged:
        reasons = "\n".join(f"  {reason}" for reason in damaged.values())
        raise CheckpointError(
            f"no undamaged checkpoint is left in {root}:\n{reasons}\nRestore one, or move them away to start anew."
        )
    return None


def check_is_checkpoint(directory: Path) -> None:
    """Raise a CheckpointError if a user took something else for a checkpoint; it names the one that lies below.

    Args:
        directory: what the user gave.
    """
    if not directory.exists():
        raise CheckpointError(f"{directory} does not exist")
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; expected the directory of a checkpoint, e.g. RUN/ckpt/9999")
    if any((directory / name).exists() for name in (MANIFEST, ".metadata")):
        return
    below = [directory, *sorted(path for path in directory.iterdir() if path.is_dir())]
    newest = next((found[-1] for root in below if (found := find_all_checkpoints(root))), None)
    if newest is not None:
        raise CheckpointError(f"{directory} is no checkpoint; the newest one below it is {newest}")
    raise CheckpointError(f"{directory} is no checkpoint: it has neither {MANIFEST} nor .metadata")


def _check_share(directory: Path, verify: Verify, rank: int, world_size: int) -> None:
    if not (directory / MANIFEST).exists():
        return _check_without_manifest(directory)
    listed: dict[str, dict[str, Any]] = read_manifest(directory)["files"]
    wants_checksums = verify is True or (
        verify == "auto" and sum(entry["bytes"] for entry in listed.values()) <= AUTO_VERIFY_BYTES
    )
    for number, (name, entry) in enumerate(listed.items()):
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes, should have {entry['bytes']}")
        if wants_checksums and number % world_size == rank and files.crc32(path) != entry["crc32"]:
            raise CheckpointError(f"{path} has another checksum than when it was written")


def _check_without_manifest(directory: Path) -> None:
    if not (directory / ".metadata").is_file():
        raise CheckpointError(f"{directory} has neither {MANIFEST} nor .metadata: its save was interrupted")
    needed: dict[str, int] = {}
    for storage in read_metadata(directory).storage_data.values():
        needed[storage.relative_path] = max(needed.get(storage.relative_path, 0), storage.offset + storage.length)
    for name, size in needed.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size < size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, needs {size}")


def _set_aside(directories: list[Path]) -> None:
    for directory in directories:
        names = (f"{directory.name}.corrupt{number}" for number in itertools.count(2))
        aside = directory.with_name(f"{directory.name}.corrupt")
        while aside.exists():
            aside = directory.with_name(next(names))
        directory.rename(aside)
        logger.warning("kept the damaged checkpoint as %s", aside)
