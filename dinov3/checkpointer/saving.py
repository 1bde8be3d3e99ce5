"""Writing a checkpoint into a temporary directory, checked, and renamed when it is complete; at once or in a thread.

A crash at any moment, an I/O error or a full disk leaves the checkpoints that were there before.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from dinov3.checkpointer.dcp import CheckpointError, run_on_all, run_on_main, save_dcp, start_saving_dcp
from dinov3.checkpointer.manifest import digest_file, write_manifest
from dinov3.distributed import get_process_subgroup, get_rank, get_world_size
from dinov3.utils.files import explaining_full_disk, publish_directory, temporary_beside


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
    _check_metadata(metadata)
    with _explaining_failure(target):
        temporary = run_on_main(group, lambda: _make_temporary(target, overwrite))
        with _removing_on_failure(temporary, group):
            state = _collect_state(iteration, model, optimizer, others)
            # Each step is confirmed by all ranks: none may rename a directory to which another could not write.
            run_on_all(group, lambda: _save_dcp(state, temporary, target, group))
            _complete(temporary, target, group, iteration=iteration, contents=state, metadata=metadata)


class BackgroundSaver:
    """Writes one checkpoint at a time while the training continues; all ranks make the same calls.

    The state is copied, then a thread writes, checks and renames it: a checkpoint appears under its name as late as one
    that was saved at once.
    """

    def __init__(self) -> None:
        self._group = get_process_subgroup()
        self._group_of_threads: ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._problem: CheckpointError | None = None

    @property
    def is_running(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        ckpt_dir: str | os.PathLike[str],
        *,
        iteration: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        metadata: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """Begin what `save_checkpoint` does, once the previous save is complete; see there for the arguments.

        Later changes to the model do not affect what is saved.

        Raises:
            CheckpointError: the previous save failed, or this one cannot begin; on all ranks.
            ValueError: `metadata` is not JSON.
        """
        self.wait()
        _check_metadata(metadata)
        target = Path(ckpt_dir)
        if self._group is not None and self._group_of_threads is None:
            # Threads talk over a group of their own, so that they disturb no collective of the training.
            ranks = dist.get_process_group_ranks(self._group)
            new_group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
            assert isinstance(new_group, ProcessGroup)
            self._group_of_threads = new_group
        group = self._group_of_threads
        with _explaining_failure(target):
            temporary = run_on_main(self._group, lambda: _make_temporary(target, overwrite=True))
            with _removing_on_failure(temporary, self._group):
                state = _collect_state(iteration, model, optimizer, others)
                contents = list(state)
                started: list[Future[Any]] = []
                run_on_all(self._group, lambda: started.append(start_saving_dcp(state, temporary, group)))

        def wait_for_writing() -> None:
            with explaining_full_disk(target):
                started[0].result()

        def finish() -> None:
            try:
                with _explaining_failure(target), _removing_on_failure(temporary, group):
                    run_on_all(group, wait_for_writing)
                    _complete(temporary, target, group, iteration=iteration, contents=contents, metadata=metadata)
            except CheckpointError as error:
                self._problem = error
            except Exception as error:  # Above all, a lost rank.
                self._problem = CheckpointError(f"{type(error).__name__}: {error}")

        self._thread = threading.Thread(target=finish, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save in progress, if there is one.

        Raises:
            CheckpointError: it failed; raised once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem


def _check_metadata(metadata: dict[str, Any] | None) -> None:
    try:
        json.dumps(metadata)
    except TypeError as error:
        raise ValueError(f"metadata must be JSON: {error}") from error


@contextmanager
def _explaining_failure(target: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {target} could not be saved: {error}") from error


@contextmanager
def _removing_on_failure(temporary: Path, group: ProcessGroup | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if get_rank(group) == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _save_dcp(state: dict[str, Any], temporary: Path, target: Path, group: ProcessGroup | None) -> None:
    with explaining_full_disk(target):
        save_dcp(state, temporary, group)


def _make_temporary(target: Path, overwrite: bool) -> Path:
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} already exists and overwrite is off")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    temporary.mkdir()
    return temporary


def _collect_state(
    iteration: int, model: nn.Module, optimizer: torch.optim.Optimizer | None, others: dict[str, Any]
) -> dict[str, Any]:
    state: dict[str, Any] = {"iteration": iteration, "model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return state | others


def _complete(
    temporary: Path,
    target: Path,
    group: ProcessGroup | None,
    *,
    iteration: int,
    contents: Iterable[str],
    metadata: dict[str, Any] | None,
) -> None:
    """Write the manifest of a directory that has all other files, and give it its name."""
    digests = run_on_all(group, lambda: _digest_share(temporary, group))
    world_size = get_world_size(group)

    def publish() -> None:
        write_manifest(
            temporary,
            iteration=iteration,
            world_size=world_size,
            digests={name: digest for of_rank in digests for name, digest in of_rank.items()},
            contents=sorted(contents),
            metadata=metadata or {},
        )
        publish_directory(temporary, target)

    run_on_main(group, publish)


def _digest_share(temporary: Path, group: ProcessGroup | None) -> dict[str, dict[str, Any]]:
    # Each rank answers for the files that it wrote, rank 0 for the rest too.
    rank, n_ranks = get_rank(group), get_world_size(group)
    own = f"__{rank}_"
    of_others = tuple(f"__{other}_" for other in range(n_ranks) if other != rank)
    return {
        path.name: digest_file(path)
        for path in temporary.iterdir()
        if path.name.startswith(own) or (rank == 0 and not path.name.startswith(of_others))
    }
