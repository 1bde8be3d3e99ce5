"""Starting something new with the weights of one network, from a file or a checkpoint directory."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from dinov3.checkpointer.dcp import CheckpointError, load_dcp, read_metadata
from dinov3.checkpointer.loading import compare_entries
from dinov3.checkpointer.manifest import check_files
from dinov3.distributed import get_process_subgroup
from dinov3.utils.state_dicts import choose_prefix, find_prefixes, flatten
from dinov3.utils.weight_files import WeightsError, read_file

#: Where the teacher may be in a directory; an exported teacher has no name of its own.
TEACHER_PREFIXES = ("model.model_ema.", "model.teacher.", "model.")
BACKBONE = "backbone."


def init_fsdp_model_from_checkpoint(
    model: nn.Module,
    checkpoint_path: str | os.PathLike[str],
    skip_load_keys: Sequence[str] = (),
    keys_not_sharded: Sequence[str] = (),
) -> None:
    """Fill a plain or sharded network strictly; files are mapped, and each rank keeps only its shard of each tensor.

    Args:
        model: on its device; keys such as `backbone.*`, `dino_head.*`.
        checkpoint_path: a file with the entries below any keys and prefixes (of several such networks, the entry
            `teacher`), or a torch.distributed.checkpoint directory: an exported teacher or a whole training, whose
            teacher is taken. A file may hold a bare backbone, if `skip_load_keys` names the heads.
        skip_load_keys: entries whose name contains one of these keep their value, and are ignored in the checkpoint.
        keys_not_sharded: entries that are whole on every rank. `model` itself says what is sharded; this checks it.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit; nothing was loaded.
        FileNotFoundError: there is no such file.
        ValueError: an entry of `keys_not_sharded` is sharded.
    """
    path = Path(checkpoint_path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")

    def is_skipped(key: str) -> bool:
        return any(word in key for word in skip_load_keys)

    wanted = {key: value for key, value in model.state_dict().items() if not is_skipped(key)}
    for key, value in wanted.items():
        if isinstance(value, DTensor) and any(word in key for word in keys_not_sharded):
            raise ValueError(f"{key} is sharded, but keys_not_sharded names it")
    if path.is_file():
        saved = _read_network(path, wanted)
        _fill(wanted, {key: value for key, value in saved.items() if not is_skipped(key)}, path)
        return
    group = get_process_subgroup()
    check_files(path, "auto", group)
    entries = read_metadata(path).state_dict_metadata
    prefix = next((p for p in TEACHER_PREFIXES if any(name.startswith(p) for name in entries)), "")
    shapes = {
        key.removeprefix(prefix): entry.size if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in entries.items()
        if key.startswith(prefix) and not is_skipped(key)
    }
    compare_entries(wanted, shapes).check(path, strict=True)
    load_dcp({prefix + key: value for key, value in wanted.items()}, path, group)


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


@torch.no_grad()
def _fill(wanted: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: object) -> None:
    compare_entries(dict(wanted), {key: value.shape for key, value in saved.items()}).check(source, strict=True)
    for key, target in wanted.items():
        value = saved[key]
        if isinstance(target, DTensor):
            # `src_data_rank=None`: every rank has the file, so none needs to send it.
            value = distribute_tensor(
                value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
            )
        target.copy_(value)


def _read_network(path: Path, wanted: Collection[str]) -> dict[str, Tensor]:
    try:
        # Mapped, because each rank copies only its shards, and the file is left before this returns.
        flat = flatten(read_file(path, mmap=True), source=str(path))
        saved = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
        networks = tuple({f"{name.partition('.')[0]}." for name in wanted})
        mark = next((name for name in wanted if name.startswith(BACKBONE)), next(iter(wanted), ""))
        advice = "save only the one that you mean"
        if prefixes := find_prefixes(saved, mark):
            prefix = choose_prefix(prefixes, source=str(path), what="networks", advice=advice)
            under = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
            return {name: value for name, value in under.items() if name.startswith(networks)}
        if mark.startswith(BACKBONE) and (prefixes := find_prefixes(saved, mark.removeprefix(BACKBONE))):
            prefix = choose_prefix(prefixes, source=str(path), what="backbones", advice=advice)
            return {BACKBONE + name.removeprefix(prefix): v for name, v in saved.items() if name.startswith(prefix)}
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    return {name.removeprefix("teacher."): value for name, value in saved.items()}
