"""Steps of saving and loading that all ranks must agree on: they succeed everywhere or raise everywhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from dinov3.checkpointer.unpickling import SafeLoadPlanner, SafeReader
from dinov3.distributed import all_gather_objects, broadcast_object, get_rank

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved, found or loaded; the message says why."""


def on_main(group: ProcessGroup | None, step: Callable[[], T]) -> T:
    """Run `step` in the group's rank 0; its result, or its error as a `CheckpointError`, arrives on every rank."""
    outcome = _try(step) if get_rank(group) == 0 else None
    result, problem = broadcast_object(outcome, group) or (None, "no answer from rank 0")
    if problem is not None:
        raise CheckpointError(problem)
    return result  # type: ignore[return-value]


def on_all(group: ProcessGroup | None, step: Callable[[], T]) -> list[T]:
    """Run `step` on every rank; all results in rank order, or one `CheckpointError` with everything that failed."""
    outcomes = all_gather_objects(_try(step), group)
    problems = [problem for _, problem in outcomes if problem is not None]
    if problems:
        raise CheckpointError("; ".join(dict.fromkeys(problems)))
    return [result for result, _ in outcomes]  # type: ignore[misc]


def save_dcp(state: dict[str, Any], directory: Path, group: ProcessGroup | None) -> None:
    """`torch.distributed.checkpoint.save`, also without a process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer = FileSystemWriter(directory, sync_files=True)
        state_dict_saver.save(state, storage_writer=writer, process_group=group, no_dist=group is None)


def start_saving_dcp(state: dict[str, Any], directory: Path, group: ProcessGroup | None) -> Future[Any]:
    """`torch.distributed.checkpoint.async_save`: `state` is copied now and written by a thread.

    Args:
        state: what to save; what happens to it afterwards does not matter.
        directory: an empty one.
        group: with a CPU backend, and used by nobody else until the save is complete.

    Returns:
        Done when this rank is.
    """
    writer = FileSystemWriter(directory, sync_files=True)
    future = state_dict_saver.async_save(state, storage_writer=writer, process_group=group)
    assert isinstance(future, Future)
    return future


def load_dcp(state: dict[str, Any], directory: Path, group: ProcessGroup | None) -> None:
    """`torch.distributed.checkpoint.load`, also without a process group; runs no code out of the directory.

    Raises:
        CheckpointError: the files are damaged, or hold more than tensors and plain data.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            state_dict_loader.load(
                state,
                storage_reader=SafeReader(directory),
                planner=SafeLoadPlanner(),
                process_group=group,
                no_dist=group is None,
            )
        except CheckpointException as error:
            raise CheckpointError(f"{directory}: {_describe(error)}") from error


def _try(step: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return step(), None
    # torch's CheckpointException is no Exception.
    except (Exception, CheckpointException) as error:
        return None, _describe(error)


def _describe(error: BaseException) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, CheckpointException):
        return "; ".join(dict.fromkeys(_describe(cause) for cause, _ in error.failures.values()))
    return f"{type(error).__name__}: {error}"
