"""Weights of one network from a file or a checkpoint directory, for starting something new with them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from dinov3.checkpointer.agreement import CheckpointError, load_dcp
from dinov3.checkpointer.loading import compare_entries
from dinov3.checkpointer.manifest import check_files, read_metadata
from dinov3.checkpointer.reading import read_tensors
from dinov3.distributed import get_process_subgroup
from dinov3.utils.weight_files import WeightsError, read_file

#: Where the network may be in a directory: in a training checkpoint it is the teacher.
DIRECTORY_PREFIXES = ("model.model_ema.", "model.teacher.", "model.")
BACKBONE = "backbone."


def init_fsdp_model_from_checkpoint(
    model: nn.Module,
    checkpoint_path: str | os.PathLike[str],
    skip_load_keys: Sequence[str] | None = None,
    keys_not_sharded: Sequence[str] | None = None,
    process_group: ProcessGroup | None = None,
) -> None:
    """Fill a plain or sharded network strictly; files are mapped, and each rank keeps only its shard of each tensor.

    Args:
        model: on its device; keys such as `backbone.*`, `dino_head.*`.
        checkpoint_path: a `.pth` file with the entry `teacher` or the bare entries, a safetensors file, or a
            torch.distributed.checkpoint directory: an exported teacher or a whole training, whose teacher is taken. A
            file may hold a bare backbone, if `skip_load_keys` names the heads.
        skip_load_keys: entries whose name contains one of these keep their value, and are ignored in the checkpoint.
        keys_not_sharded: entries that are whole on every rank. `model` itself says what is sharded; this checks it.
        process_group: the processes that hold the model, for a directory; by default the subgroup of this process.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit; nothing was loaded.
        FileNotFoundError: there is no such file.
        ValueError: an entry of `keys_not_sharded` is sharded.
    """
    path = Path(checkpoint_path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    skipped = tuple(skip_load_keys or ())
    wanted = {key: value for key, value in model.state_dict().items() if not _contains(key, skipped)}
    for key, value in wanted.items():
        if _contains(key, tuple(keys_not_sharded or ())) and isinstance(value, DTensor):
            raise ValueError(f"{key} is sharded, but keys_not_sharded names it")
    if path.is_dir():
        _fill_from_directory(wanted, path, skipped, process_group or get_process_subgroup())
    else:
        _fill_from_file(wanted, path, skipped)


def fill_from_tensors(model: nn.Module, saved: Mapping[str, Tensor], *, source: object) -> None:
    """Fill a plain or sharded network strictly with whole tensors, which every rank has; each keeps its shards.

    Args:
        model: on its device.
        saved: the tensors by the names of the model's state dict.
        source: where they come from, for error messages.

    Raises:
        CheckpointError: they do not fit; nothing was loaded.
    """
    _fill(model.state_dict(), saved, source)


def init_model_from_checkpoint_for_evals(
    model: nn.Module, pretrained_weights: str | os.PathLike[str], checkpoint_key: str | None = None
) -> None:
    """Fill a plain backbone strictly with the backbone of a checkpoint; heads that are saved with it are ignored.

    Args:
        model: on its device, without the prefix `backbone.` in its keys.
        pretrained_weights: a `.pth` or safetensors file with a bare backbone or with keys `backbone.*`, or a
            torch.distributed.checkpoint directory.
        checkpoint_key: the entry of a `.pth` file that holds the weights, where there is one; `"teacher"` is found
            without it.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit; nothing was loaded.
        FileNotFoundError: there is no such file.
    """
    path = Path(pretrained_weights)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    saved = _read_directory(path) if path.is_dir() else _map_file(path, checkpoint_key)
    saved = {key.removeprefix("module."): value for key, value in saved.items()}
    if any(key.startswith(BACKBONE) for key in saved):
        saved = {key.removeprefix(BACKBONE): value for key, value in saved.items() if key.startswith(BACKBONE)}
    compare_entries(model.state_dict(), {key: value.shape for key, value in saved.items()}).check(path, strict=True)
    model.load_state_dict(saved)


def _read_directory(path: Path) -> dict[str, Tensor]:
    check_files(path, "auto", get_process_subgroup())
    prefix = _network_prefix(read_metadata(path).state_dict_metadata)
    return read_tensors(path, prefix)


def _network_prefix(entries: Iterable[str]) -> str:
    names = list(entries)
    return next((prefix for prefix in DIRECTORY_PREFIXES if any(name.startswith(prefix) for name in names)), "")


def _fill_from_directory(
    wanted: dict[str, Any], path: Path, skipped: tuple[str, ...], group: ProcessGroup | None
) -> None:
    check_files(path, "auto", group)
    entries = read_metadata(path).state_dict_metadata
    prefix = _network_prefix(entries)
    shapes = {
        key.removeprefix(prefix): entry.size if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in entries.items()
        if key.startswith(prefix) and not _contains(key, skipped)
    }
    compare_entries(wanted, shapes).check(path, strict=True)
    load_dcp({prefix + key: value for key, value in wanted.items()}, path, group)


def _fill_from_file(wanted: dict[str, Any], path: Path, skipped: tuple[str, ...]) -> None:
    saved = _with_prefixes_of(wanted, _map_file(path))
    _fill(wanted, {key: value for key, value in saved.items() if not _contains(key, skipped)}, path)


@torch.no_grad()
def _fill(wanted: dict[str, Any], saved: Mapping[str, Tensor], source: object) -> None:
    compare_entries(wanted, {key: value.shape for key, value in saved.items()}).check(source, strict=True)
    for key, target in wanted.items():
        if isinstance(target, DTensor):
            # `src_data_rank=None`: every rank has the file, so none needs to send it.
            shard = distribute_tensor(
                saved[key].to(target.device), target.device_mesh, target.placements, src_data_rank=None
            )
            target.copy_(shard)
        else:
            target.copy_(saved[key])


def _map_file(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file, or those below the entry `entry`, else `teacher`, where the file has it."""
    try:
        content = read_file(path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    for key in (entry, "teacher"):
        if key is not None and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _with_prefixes_of(wanted: dict[str, Any], saved: dict[str, Tensor]) -> dict[str, Tensor]:
    saved = {key.removeprefix("module."): value for key, value in saved.items()}
    networks = {key.partition(".")[0] for key in wanted}
    is_bare_backbone = not any(key.partition(".")[0] in networks for key in saved)
    if is_bare_backbone and BACKBONE.rstrip(".") in networks:
        return {BACKBONE + key: value for key, value in saved.items()}
    return saved


def _contains(key: str, words: tuple[str, ...]) -> bool:
    return any(word in key for word in words)
