"""Reading entries of a checkpoint by name, without a model and without a process group."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dinov3.checkpointer.agreement import load_dcp
from dinov3.checkpointer.manifest import read_metadata


def read_tensors(directory: str | os.PathLike[str], prefix: str = "") -> dict[str, Tensor]:
    """Read whole tensors of a torch.distributed.checkpoint directory into CPU memory, in this process alone.

    Args:
        directory: the checkpoint; one without a manifest will do.
        prefix: only entries whose name starts with it, e.g. `"model.model_ema.backbone."`.

    Returns:
        The tensors by name, without the prefix; empty if there are none.

    Raises:
        CheckpointError: the directory is no checkpoint, or is damaged.
    """
    metadata = read_metadata(Path(directory))
    entries = {
        name: _empty_like(entry)
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if entries:
        load_dcp(entries, Path(directory), None)
    return {name.removeprefix(prefix): tensor for name, tensor in entries.items()}


def read_nested(directory: Path, metadata: Metadata, name: str, group: ProcessGroup | None) -> Any:
    """Read the entry `name` with everything below it, nested as it was saved; all ranks of `group` call it.

    Returns:
        None if there is no such entry.

    Raises:
        CheckpointError: the directory is damaged.
    """
    entries = {key: entry for key, entry in metadata.state_dict_metadata.items() if is_below(key, name)}
    if not entries:
        return None
    flat: dict[str, Any] = {
        key: _empty_like(entry) if isinstance(entry, TensorStorageMetadata) else None for key, entry in entries.items()
    }
    load_dcp(flat, directory, group)
    paths = metadata.planner_data or {}
    return _nest({paths.get(key, (key,)): value for key, value in flat.items()}, depth=len(name.split(".")))


def is_below(key: str, name: str) -> bool:
    """Whether the entry `key` is `name` or below it."""
    return key == name or key.startswith(f"{name}.")


def _empty_like(entry: TensorStorageMetadata) -> Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _nest(values: dict[tuple[str | int, ...], Any], depth: int) -> Any:
    """The values by path, from the `depth`-th step of the path on, as dictionaries (string steps) and lists."""
    if len(values) == 1:
        (path, value), *_ = values.items()
        if len(path) == depth:
            return value
    below: dict[str | int, dict[tuple[str | int, ...], Any]] = {}
    for path, value in values.items():
        below.setdefault(path[depth], {})[path] = value
    nested = {step: _nest(part, depth + 1) for step, part in below.items()}
    return [nested[i] for i in sorted(nested)] if all(isinstance(step, int) for step in nested) else nested
