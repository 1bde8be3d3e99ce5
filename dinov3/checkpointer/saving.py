"""Writing a checkpoint: into a temporary directory, checked, renamed when it is complete.

A crash at any moment, an I/O error or a full disk leaves the checkpoints that were there before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from dinov3.checkpointer import files
from dinov3.checkpointer.agreement import CheckpointError, on_all, on_main, save_dcp
from dinov3.checkpointer.manifest import digest_of, write_manifest
from dinov3.distributed import get_process_subgroup, get_rank, get_world_size


def save_checkpoint(
    ckpt_dir: str | os.PathLike[str],
    *,
    iteration: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    overwrite: bool = True,
    process_group: ProcessGroup | None = None,
    metadata: dict[str, Any] | None = None,
    **others: Any,
) -> None:
    """Save a training as a torch.distributed.checkpoint directory plus `checkpoint.json`; all ranks call it.

    Entries: `iteration`, `model.<key>`, `optimizer.state.<parameter>.<name>`, `optimizer.param_groups.<i>.<field>` and
    `<other>.<key>`, without the prefixes of activation checkpointing and compilation. The directory appears under its
    name only when it is complete and on the disk.

    Args:
        ckpt_dir: the directory to make, e.g. `<run>/ckpt/<iteration>`.
        iteration: the iteration that was just finished.
        model: plain or sharded.
        optimizer: of the model's parameters.
        overwrite: replace an existing directory.
        process_group: the processes that hold the model, by default the subgroup of this process.
        metadata: anything that JSON can hold, for the manifest.
        others: further objects with `state_dict()` and `load_state_dict()`. Non-tensor entries of the same name must be
            equal on all ranks; empty dictionaries in them are lost.

    Raises:
        CheckpointError: the directory exists and `overwrite` is off, or it cannot be written; on all ranks. Nothing but
            the temporary directory has changed, and that is gone.
        ValueError: `metadata` is not JSON.
    """
    target = Path(ckpt_dir)
    group = process_group or get_process_subgroup()
    check_metadata(metadata)
    with naming(target):
        temporary = on_main(group, lambda: make_temporary(target, overwrite))
        with removed_on_error(temporary, group):
            state = collect_state(iteration, model, optimizer, others)
            digests = on_all(group, lambda: _write(state, temporary, group))
            publish(temporary, target, group, digests, iteration=iteration, contents=state, metadata=metadata)


def check_metadata(metadata: dict[str, Any] | None) -> None:
    """Raise a `ValueError` unless JSON can hold `metadata`."""
    try:
        json.dumps(metadata)
    except TypeError as error:
        raise ValueError(f"metadata must be JSON: {error}") from error


@contextmanager
def naming(target: Path) -> Iterator[None]:
    """Say in a `CheckpointError` of the body which checkpoint could not be saved."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {target} could not be saved: {error}") from error


@contextmanager
def removed_on_error(temporary: Path, group: ProcessGroup | None) -> Iterator[None]:
    """Leave no half of a checkpoint behind when the body fails."""
    try:
        yield
    except BaseException:
        if get_rank(group) == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def collect_state(
    iteration: int, model: nn.Module, optimizer: torch.optim.Optimizer | None, others: dict[str, Any]
) -> dict[str, Any]:
    """Everything that is saved, by its name in the checkpoint."""
    state: dict[str, Any] = {"iteration": iteration, "model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return state | others


def publish(
    temporary: Path,
    target: Path,
    group: ProcessGroup | None,
    digests: list[dict[str, dict[str, Any]]],
    *,
    iteration: int,
    contents: Iterable[str],
    metadata: dict[str, Any] | None,
) -> None:
    """Write the manifest of a directory whose other files are complete, and give it its name."""
    world_size = get_world_size(group)
    on_main(
        group,
        lambda: write_manifest(
            temporary,
            iteration=iteration,
            world_size=world_size,
            digests={name: digest for of_rank in digests for name, digest in of_rank.items()},
            contents=sorted(contents),
            metadata=metadata or {},
        ),
    )
    on_main(group, lambda: files.publish(temporary, target))


def make_temporary(target: Path, overwrite: bool) -> Path:
    """The directory that becomes `target`, empty, under a name of its own."""
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists already and overwrite is off")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = files.temporary_beside(target)
    temporary.mkdir()
    return temporary


def _write(state: dict[str, Any], temporary: Path, group: ProcessGroup | None) -> dict[str, dict[str, Any]]:
    save_dcp(state, temporary, group)
    return digest_share(temporary, group)


def digest_share(temporary: Path, group: ProcessGroup | None) -> dict[str, dict[str, Any]]:
    """The digests of the files that this rank answers for: its own, and in rank 0 the rest."""
    rank, n_ranks = get_rank(group), get_world_size(group)
    own = f"__{rank}_"
    of_others = tuple(f"__{other}_" for other in range(n_ranks) if other != rank)
    return {
        path.name: digest_of(path)
        for path in temporary.iterdir()
        if path.name.startswith(own) or (rank == 0 and not path.name.startswith(of_others))
    }
