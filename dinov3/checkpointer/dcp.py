"""torch.distributed.checkpoint directories: saved and loaded with errors that reach every rank, without running code.

Notable: torch unpickles the index (`.metadata`), and every entry that is not a tensor, without restrictions. Both are
checked first here, so that a checkpoint from an unknown source can be read.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from dinov3.distributed import all_gather_objects, broadcast_object, get_rank

T = TypeVar("T")

INDEX = ".metadata"
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
#: Everything that an index consists of, besides dtypes.
_INDEX_CLASSES = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    *((_METADATA_MODULE, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_METADATA_MODULE, name) for name in ("TensorProperties", "TensorStorageMetadata")),
    *((_METADATA_MODULE, name) for name in ("ChunkStorageMetadata", "BytesStorageMetadata")),
}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved, found or loaded; the message says why."""


def run_on_main(group: ProcessGroup | None, step: Callable[[], T]) -> T:
    """Run `step` on rank 0 of `group`; every rank returns its result, or raises its error as a `CheckpointError`."""
    outcome: tuple[Any, str | None] = _attempt(step) if get_rank(group) == 0 else (None, None)
    result, problem = broadcast_object(outcome, group)
    if problem is not None:
        raise CheckpointError(problem)
    return result


def run_on_all(group: ProcessGroup | None, step: Callable[[], T]) -> list[T]:
    """Run `step` on every rank and return all results in rank order.

    Raises:
        CheckpointError: it failed somewhere; every rank raises, with the errors of all of them.
    """
    outcomes: list[tuple[Any, str | None]] = all_gather_objects(_attempt(step), group)
    problems = [problem for _, problem in outcomes if problem is not None]
    if problems:
        raise CheckpointError("; ".join(dict.fromkeys(problems)))
    return [result for result, _ in outcomes]


def save_dcp(state: dict[str, Any], directory: Path, group: ProcessGroup | None) -> None:
    """Call `torch.distributed.checkpoint.save`, also without a process group."""
    with _without_group_warning():
        writer = FileSystemWriter(directory, sync_files=True)
        state_dict_saver.save(state, storage_writer=writer, process_group=group, no_dist=group is None)


def start_saving_dcp(state: dict[str, Any], directory: Path, group: ProcessGroup | None) -> Future[Any]:
    """Copy `state` and let a thread write it, with `torch.distributed.checkpoint.async_save`.

    Args:
        state: what to save; later changes to it do not matter.
        directory: an empty one.
        group: one with a CPU backend that nobody else uses until the save is complete.

    Returns:
        A future that is done when this rank has written its part.
    """
    writer = FileSystemWriter(directory, sync_files=True)
    future = state_dict_saver.async_save(state, storage_writer=writer, process_group=group)
    assert isinstance(future, Future)
    return future


def load_dcp(state: dict[str, Any], directory: Path, group: ProcessGroup | None) -> None:
    """Call `torch.distributed.checkpoint.load`, also without a process group, and run no code from the directory.

    Raises:
        CheckpointError: the files are damaged, or hold more than tensors and plain data.
    """
    with _without_group_warning():
        try:
            state_dict_loader.load(
                state,
                storage_reader=_SafeReader(directory),
                planner=_SafeLoadPlanner(),
                process_group=group,
                no_dist=group is None,
            )
        except CheckpointException as error:
            raise CheckpointError(f"{directory}: {_describe(error)}") from error


def read_metadata(directory: Path) -> Metadata:
    """Read the index of a torch.distributed.checkpoint directory.

    Raises:
        CheckpointError: it is missing or damaged, or it could run code.
    """
    try:
        return _SafeReader(directory).read_metadata()
    except OSError as error:
        raise CheckpointError(f"{directory / INDEX} cannot be read: {type(error).__name__}: {error}") from error
    except Exception as error:
        raise CheckpointError(
            f"{directory / INDEX} is not the index of a distributed checkpoint, or is damaged: {error}"
        ) from error


def read_tensors(directory: str | os.PathLike[str], prefix: str = "") -> dict[str, Tensor]:
    """Read whole tensors into CPU memory, in this process only, without a model.

    Args:
        directory: the checkpoint; it need not have a manifest.
        prefix: only entries whose name starts with it, e.g. `"model.model_ema.backbone."`.

    Returns:
        The tensors by name, without the prefix; empty if there are none.

    Raises:
        CheckpointError: the directory is not a checkpoint, or is damaged.
    """
    directory = Path(directory)
    entries = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in read_metadata(directory).state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if entries:
        load_dcp(entries, directory, None)
    return {name.removeprefix(prefix): tensor for name, tensor in entries.items()}


def read_nested(directory: Path, metadata: Metadata, name: str, group: ProcessGroup | None) -> Any:
    """Read the entry `name` and everything below it, nested as it was saved; all ranks of `group` call it.

    Returns:
        None if there is no such entry.

    Raises:
        CheckpointError: the directory is damaged.
    """
    flat: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in metadata.state_dict_metadata.items()
        if key == name or key.startswith(f"{name}.")
    }
    if not flat:
        return None
    load_dcp(flat, directory, group)
    paths = metadata.planner_data or {}
    return _nest({paths.get(key, (key,)): value for key, value in flat.items()}, depth=len(name.split(".")))


def _nest(values: dict[tuple[str | int, ...], Any], depth: int) -> Any:
    # From step `depth` of each path on: dictionaries for string steps, lists for integer ones.
    if len(values) == 1:
        (path, value), *_ = values.items()
        if len(path) == depth:
            return value
    branches: dict[str | int, dict[tuple[str | int, ...], Any]] = {}
    for path, value in values.items():
        branches.setdefault(path[depth], {})[path] = value
    nested = {step: _nest(branch, depth + 1) for step, branch in branches.items()}
    return [nested[i] for i in sorted(nested)] if all(isinstance(step, int) for step in nested) else nested


@contextmanager
def _without_group_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _attempt(step: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return step(), None
    # torch's CheckpointException is a BaseException.
    except (Exception, CheckpointException) as error:
        return None, _describe(error)


def _describe(error: BaseException) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, CheckpointException):
        return "; ".join(dict.fromkeys(_describe(cause) for cause, _ in error.failures.values()))
    return f"{type(error).__name__}: {error}"


if torch.__version__ < "2.8":
    # It sends the outcome of a save from global rank 0, which is not in the group of a second student.
    def _broadcast_object(self: Any, object: Any) -> Any:
        return broadcast_object(object, self.group) if self.use_dist else object

    wrapper: Any = torch.distributed.checkpoint.utils._DistWrapper
    wrapper.broadcast_object = _broadcast_object


class _SafeReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / INDEX).open("rb") as file:
            _IndexUnpickler(file).load()
        return super().read_metadata()


class _SafeLoadPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = f"it refers to {found[1]}, which could run code" if found else str(error)
            raise pickle.UnpicklingError(
                f"the entry {read_item.storage_index.fqn!r} holds more than plain data: {what}"
            ) from error
        value.seek(0)
        super().load_bytes(read_item, value)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _INDEX_CLASSES and not is_dtype:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which could run code")
        return super().find_class(module, name)
