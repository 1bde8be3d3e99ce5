"""One network of a sharded checkpoint as one file: `python -m dinov3.checkpointer.consolidate DIR OUT.pth`.

Notable: no process group, no model. The shards are put together in memory-mapped files beside the output, so that the
network need not fit into memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dinov3.checkpointer.agreement import CheckpointError, load_dcp
from dinov3.checkpointer.files import fsync, temporary_beside
from dinov3.checkpointer.initializing import BACKBONE
from dinov3.checkpointer.manifest import check_files, check_is_checkpoint, read_metadata
from dinov3.utils.weight_files import write_safetensors

#: Where a network is, by its name on the command line; an exported teacher has no name of its own.
PREFIXES = {"teacher": ("model.model_ema.", "model.teacher.", "model."), "student": ("model.student.",)}


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
        what: the backbone alone, with bare names, or all with `backbone.*`, `dino_head.*`, `ibot_head.*`.
        safetensors: this format, without an entry above the tensors; else `torch.save` of `{"teacher": ...}` (for the
            student too, because loaders look for it) or, for a backbone, of the bare entries.

    Returns:
        The names of the tensors in the file.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or does not hold that network.
        FileNotFoundError: the directory of `output` does not exist.
    """
    directory, output = Path(directory), Path(output)
    check_is_checkpoint(directory)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent}, where {output.name} should be written, does not exist")
    check_files(directory, "auto", None)
    with tempfile.TemporaryDirectory(prefix=".tmp-consolidate-", dir=output.parent) as scratch:
        tensors = _read(directory, _names(directory, model, what), Path(scratch))
        temporary = temporary_beside(output)
        try:
            if safetensors:
                write_safetensors(temporary, tensors, {"format": "pt"})
            else:
                torch.save(tensors if what == "backbone" else {"teacher": tensors}, temporary)
            fsync(temporary)
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)
    return list(tensors)


def _names(directory: Path, model: str, what: str) -> dict[str, str]:
    """The names in the checkpoint, by the names in the file."""
    entries = read_metadata(directory).state_dict_metadata
    is_training = any(name.startswith(PREFIXES["student"]) for name in entries)
    for prefix in PREFIXES[model]:
        if prefix == "model." and is_training:
            continue
        start = prefix + (BACKBONE if what == "backbone" else "")
        names = {
            name.removeprefix(start): name
            for name, entry in entries.items()
            if name.startswith(start) and isinstance(entry, TensorStorageMetadata)
        }
        if names:
            return names
    held = sorted({".".join(name.split(".")[:2]) for name in entries})
    raise CheckpointError(f"{directory} holds no {model} ({what}); it holds {', '.join(held)}")


def _read(directory: Path, names: dict[str, str], scratch: Path) -> dict[str, Tensor]:
    entries = read_metadata(directory).state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for number, (name, source) in enumerate(names.items()):
        entry = entries[source]
        assert isinstance(entry, TensorStorageMetadata)
        size, dtype = entry.size.numel(), entry.properties.dtype
        # An empty file cannot be mapped.
        mapped = torch.from_file(str(scratch / str(number)), shared=True, size=size, dtype=dtype) if size else None
        tensors[name] = torch.empty(entry.size, dtype=dtype) if mapped is None else mapped.reshape(entry.size)
    load_dcp({names[name]: tensor for name, tensor in tensors.items()}, directory, None)
    return tensors


def main(argv: list[str] | None = None) -> None:
    """Run the command line; `argv` is what follows the program's name."""
    parser = argparse.ArgumentParser("python -m dinov3.checkpointer.consolidate", description=__doc__.splitlines()[0])
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
