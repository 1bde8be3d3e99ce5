"""Write one network of a sharded checkpoint into one file: `python -m dinov3.checkpointer.consolidate DIR OUT.pth`.

Notable: it needs no process group and no model, and the network need not fit into memory.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dinov3.checkpointer.dcp import CheckpointError, load_dcp, read_metadata
from dinov3.checkpointer.initializing import BACKBONE, TEACHER_PREFIXES
from dinov3.checkpointer.manifest import check_files, check_is_checkpoint
from dinov3.utils.command_line import ArgumentParser
from dinov3.utils.files import atomic_write
from dinov3.utils.messages import list_names
from dinov3.utils.weight_files import write_safetensors

#: Where a network is, by its name on the command line.
PREFIXES = {"teacher": TEACHER_PREFIXES, "student": ("model.student.",)}


def consolidate(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: Literal["teacher", "student"] = "teacher",
    what: Literal["backbone", "all"] = "all",
    safetensors: bool = False,
) -> list[str]:
    """Write a network of a checkpoint directory into one file, which appears only when it is complete.

    Args:
        directory: a training's checkpoint or an exported teacher.
        output: the file; an existing one is replaced.
        model: which network.
        what: only the backbone, with bare names, or all with `backbone.*`, `dino_head.*`, `ibot_head.*`.
        safetensors: write this format, without an entry above the tensors; otherwise `torch.save` of `{"teacher": ...}`
            (for the student too, because loaders look for it) or, for a backbone, of the bare entries.

    Returns:
        The names of the tensors in the file.

    Raises:
        CheckpointError: the directory is not a checkpoint, is damaged, or does not hold that network.
        FileNotFoundError: the directory of `output` does not exist.
    """
    directory, output = Path(directory), Path(output)
    check_is_checkpoint(directory)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the directory {output.parent} for {output.name} does not exist")
    check_files(directory, "auto", None)
    prefix, entries = _find_network(directory, model, what)
    # Each tensor is read into a memory-mapped file of its own, so that the network need not fit into memory.
    with tempfile.TemporaryDirectory(prefix=".tmp-consolidate-", dir=output.parent) as scratch:
        tensors = {}
        for number, (name, entry) in enumerate(entries.items()):
            shape, dtype, scratch_file = entry.size, entry.properties.dtype, Path(scratch) / str(number)
            if shape.numel() == 0:  # an empty file cannot be mapped
                tensors[name] = torch.empty(shape, dtype=dtype)
            else:
                mapped = torch.from_file(str(scratch_file), shared=True, size=shape.numel(), dtype=dtype)
                tensors[name] = mapped.reshape(shape)
        load_dcp({prefix + name: tensor for name, tensor in tensors.items()}, directory, None)
        if safetensors:
            write_safetensors(output, tensors, {"format": "pt"})
        else:
            with atomic_write(output) as file:
                torch.save(tensors if what == "backbone" else {"teacher": tensors}, file)
    return list(tensors)


def _find_network(directory: Path, model: str, what: str) -> tuple[str, dict[str, TensorStorageMetadata]]:
    """Return what precedes the names of a network's entries, and the entries by their names without it."""
    entries = read_metadata(directory).state_dict_metadata
    is_training = any(name.startswith(PREFIXES["student"]) for name in entries)
    for prefix in PREFIXES[model]:
        if prefix == "model." and is_training:
            continue
        start = prefix + (BACKBONE if what == "backbone" else "")
        found = {
            name.removeprefix(start): entry
            for name, entry in entries.items()
            if name.startswith(start) and isinstance(entry, TensorStorageMetadata)
        }
        if found:
            return start, found
    held = sorted({".".join(name.split(".")[:2]) for name in entries})
    raise CheckpointError(f"{directory} has no {model} ({what}); it has {list_names(held, 20)}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line; `argv` is what follows the program's name."""
    parser = ArgumentParser("python -m dinov3.checkpointer.consolidate", description=__doc__.splitlines()[0])
    parser.add_argument("directory", metavar="DIR", help="a checkpoint, e.g. <run>/ckpt/9999")
    parser.add_argument("output", type=Path, metavar="OUT", help="the file to write, .pth or .safetensors")
    parser.add_argument("--model", choices=PREFIXES, default="teacher", help="which network (default: teacher)")
    parser.add_argument("--what", choices=("backbone", "all"), default="all", help="with or without heads")
    parser.add_argument("--safetensors", action="store_true", help="write safetensors instead of a PyTorch file")
    args = parser.parse_args(argv)
    wants_safetensors = args.safetensors or args.output.suffix == ".safetensors"
    try:
        names = consolidate(
            args.directory, args.output, model=args.model, what=args.what, safetensors=wants_safetensors
        )
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.output}: {len(names)} tensors, {args.output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
