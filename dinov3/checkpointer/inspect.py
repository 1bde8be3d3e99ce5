"""Show what a checkpoint directory holds: `python -m dinov3.checkpointer.inspect DIR`.

Notable: it needs no model, no process group and no memory for the tensors, and compares the files with the manifest.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dinov3.checkpointer.dcp import CheckpointError, read_metadata, read_nested
from dinov3.checkpointer.manifest import MANIFEST, check_files, check_is_checkpoint, read_manifest
from dinov3.utils.command_line import ArgumentParser


def describe_checkpoint(directory: Path, *, shows_all: bool = False) -> Iterator[str]:
    """Yield lines about a checkpoint: iteration, origin, number and size of its entries by prefix, and damage.

    Args:
        directory: the checkpoint, of this library or of the official release.
        shows_all: one line for every tensor instead of one for every prefix.

    Raises:
        CheckpointError: the directory is not a checkpoint, or is damaged.
    """
    check_is_checkpoint(directory)
    metadata = read_metadata(directory)
    yield f"iteration   {read_nested(directory, metadata, 'iteration', None)}"
    if (directory / MANIFEST).exists():
        manifest = read_manifest(directory)
        yield f"written by  {manifest['world_size']} processes, torch {manifest['torch']}"
    else:
        yield f"written by  another library (no {MANIFEST}: checksums cannot be compared)"
    check_files(directory, True, None)
    yield "files       undamaged"
    if shows_all:
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                yield f"{name}  {list(entry.size)} {str(entry.properties.dtype).removeprefix('torch.')}"
        return
    entries: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, entry in metadata.state_dict_metadata.items():
        prefix = ".".join(name.split(".")[:3])
        entries[prefix] += 1
        if isinstance(entry, TensorStorageMetadata):
            sizes[prefix] += math.prod(entry.size) * entry.properties.dtype.itemsize
    for prefix, count in entries.items():
        yield f"{prefix:40} {count:6} entries {sizes[prefix] / 2**20:10.1f} MiB"


def main(argv: list[str] | None = None) -> None:
    """Run the command line; `argv` is what follows the program's name."""
    parser = ArgumentParser("python -m dinov3.checkpointer.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint, e.g. <run>/ckpt/9999")
    parser.add_argument("--all", action="store_true", help="list every tensor")
    args = parser.parse_args(argv)
    try:
        for line in describe_checkpoint(args.directory, shows_all=args.all):
            print(line)
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
