"""Resuming: a checkpoint is read into a model and an optimizer of any sharding, strictly, after checking the files.

Notable: entries that are missing, unexpected or of a different shape are an error that lists them and guesses why.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dinov3.checkpointer.dcp import CheckpointError, load_dcp, read_metadata, read_nested
from dinov3.checkpointer.manifest import Verify, check_files
from dinov3.distributed import get_process_subgroup
from dinov3.utils.messages import list_names

logger = logging.getLogger("dinov3")

OPTIMIZER_STATE = "optimizer.state"
PARAM_GROUPS = "optimizer.param_groups"
N_LISTED = 20


@dataclass
class Differences:
    """How the entries of a checkpoint differ from those of a model."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, str] = field(default_factory=dict)

    def check(self, source: object, *, strict: bool) -> None:
        """Raise a `CheckpointError` that lists the differences; if not strict, only for different shapes."""
        if self.misshaped or (strict and (self.missing or self.unexpected)):
            raise CheckpointError(f"{source} does not fit this model:\n{self}")
        if self.missing or self.unexpected:
            logger.warning("%s does not fit this model and is loaded in part:\n%s", source, self)

    def __str__(self) -> str:
        lists = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of a different shape": [f"{key}: {shapes}" for key, shapes in self.misshaped.items()],
        }
        lines = [
            f"  {len(entries)} {what}: {list_names(entries, N_LISTED)}" for what, entries in lists.items() if entries
        ]
        return "\n".join([*lines, f"  {self._guess()}"])

    def _guess(self) -> str:
        different = [*self.missing, *self.unexpected, *self.misshaped]
        if all("_head." in key for key in different):
            return (
                "Only heads differ: compare dino.head_* and ibot.head_* (e.g. head_n_prototypes) with the saved run's."
            )
        if all(key.startswith("optimizer.") for key in different):
            return "Only the optimizer differs: was it saved at all, or were different parameters frozen?"
        if any(".backbone." in key for key in different):
            return "The backbone differs: compare student.arch, patch_size and so on with the saved run's."
        return "Compare the configuration with the one that the checkpoint was saved with."


def load_checkpoint(
    ckpt_dir: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    strict_loading: bool = True,
    process_group: ProcessGroup | None = None,
    verify: Verify = "auto",
    may_lack: Sequence[str] = (),
    **others: Any,
) -> int:
    """Load what `save_checkpoint` wrote, on any number of processes; all ranks call it.

    Args:
        ckpt_dir: the checkpoint, of this library or of the official release.
        model: plain or sharded, on its device; its entries are overwritten.
        optimizer: of the model's parameters.
        strict_loading: entries that are missing or unexpected are an error, otherwise a warning. A different shape is
            always an error.
        process_group: the processes that hold the model, by default the subgroup of this process.
        verify: compare checksums first (`"auto"`: below 8 GB); sizes are always compared.
        may_lack: prefixes of names in the model's state dict; if the checkpoint has no entries with such a prefix, the
            model's own keep their values.
        others: objects with `load_state_dict()`, by the name they were saved under. One that the checkpoint does not
            have keeps its state, with a warning.

    Returns:
        The iteration that had just been finished when it was saved; -1 if the checkpoint does not say.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit; nothing was loaded.
    """
    directory = Path(ckpt_dir)
    group = process_group or get_process_subgroup()
    check_files(directory, verify, group)
    metadata = read_metadata(directory)
    model_state = get_model_state_dict(model)
    optimizer_state: dict[str, Any] = {} if optimizer is None else get_optimizer_state_dict(model, optimizer)

    # Compared before anything is read, so that an error leaves the model as it was.
    lacking = tuple(name for name in may_lack if not _has_entries(metadata, f"model.{name}"))
    not_loaded = [key for key in model_state if key.startswith(lacking)]
    model_state = {key: value for key, value in model_state.items() if key not in not_loaded}
    wanted, differences = _match_model(model_state, metadata)
    of_optimizer, without_state = _match_optimizer(optimizer_state, metadata, differences)
    wanted |= of_optimizer
    differences.check(directory, strict=strict_loading)

    iteration = read_nested(directory, metadata, "iteration", group)
    load_dcp(wanted, directory, group)
    set_model_state_dict(model, model_state, options=StateDictOptions(strict=False))
    if optimizer is not None:
        groups = read_nested(directory, metadata, PARAM_GROUPS, group)
        _set_optimizer(model, optimizer, optimizer_state, groups, without_state)
    restored = []
    for name, other in others.items():
        saved = read_nested(directory, metadata, name, group)
        if saved is None:
            logger.warning("%s has no %r: it is not restored", directory, name)
        else:
            other.load_state_dict(saved)
            restored.append(name)
    _report(directory, metadata, wanted, not_loaded, restored)
    return -1 if iteration is None else int(iteration)


def compare_entries(
    wanted: dict[str, Any], available: dict[str, torch.Size | None], ignored: Iterable[str] = ()
) -> Differences:
    """Compare names and shapes.

    Args:
        wanted: entries to fill, tensors or other values.
        available: the shape of each entry of the checkpoint; None if it is not a tensor.
        ignored: entries that are not unexpected in the checkpoint, although they are not wanted.
    """
    may_be_there = set(ignored)
    misshaped = {
        key: f"saved {list(available[key] or ())}, here {list(value.shape)}"
        for key, value in wanted.items()
        if key in available and isinstance(value, Tensor) and available[key] != value.shape
    }
    return Differences(
        missing=[key for key in wanted if key not in available],
        unexpected=[key for key in available if key not in wanted and key not in may_be_there],
        misshaped=misshaped,
    )


def checkpoint_holds(ckpt_dir: str | os.PathLike[str], prefix: str) -> bool:
    """Return whether a checkpoint has entries whose names begin with `prefix`, such as `model.gram_teacher.`."""
    return _has_entries(read_metadata(Path(ckpt_dir)), prefix)


def _has_entries(metadata: Metadata, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in metadata.state_dict_metadata)


def _match_model(state: dict[str, Any], metadata: Metadata) -> tuple[dict[str, Any], Differences]:
    """Return the model's entries by their name in the checkpoint, and how the two differ."""
    available = _shapes(metadata, "model")
    wanted: dict[str, Any] = {}
    not_needed: set[str] = set()
    for key, value in state.items():
        name = second_name = f"model.{key}"
        if key.startswith("model_ema."):
            # Official checkpoints hold the teacher twice, as `model_ema` and as `teacher`; either will do.
            second_name = f"model.teacher.{key.removeprefix('model_ema.')}"
        wanted[second_name if name not in available and second_name in available else name] = value
        not_needed.add(second_name)
    differences = compare_entries(wanted, available, ignored=not_needed)
    return {key: value for key, value in wanted.items() if key in available}, differences


def _match_optimizer(
    state: dict[str, Any], metadata: Metadata, differences: Differences
) -> tuple[dict[str, Any], set[str]]:
    """Return the optimizer's entries by name and the parameters that have none in the checkpoint.

    Entries that do not fit are added to `differences`.
    """
    if not state:
        return {}, set()
    available = _shapes(metadata, OPTIMIZER_STATE)
    if not available:
        differences.missing.append(OPTIMIZER_STATE)
    with_state = {key.rpartition(".")[0] for key in available}
    without_state = {name for name in state["state"] if f"{OPTIMIZER_STATE}.{name}" not in with_state}
    wanted = {
        f"{OPTIMIZER_STATE}.{parameter}.{name}": value
        for parameter, entries in state["state"].items()
        if parameter not in without_state
        for name, value in entries.items()
    }
    found = compare_entries(wanted, available)
    differences.missing += found.missing
    differences.unexpected += found.unexpected
    differences.misshaped |= found.misshaped
    return {key: value for key, value in wanted.items() if key in available}, without_state


def _set_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    groups: list[dict[str, Any]] | None,
    without_state: set[str],
) -> None:
    names = [name for group in state["param_groups"] for name in group["params"]]
    if groups is not None and [set(g["params"]) for g in groups] == [set(g["params"]) for g in state["param_groups"]]:
        state["param_groups"] = groups
    else:
        logger.warning(
            "the checkpoint groups the parameters differently: keeping the optimizer's own groups and settings"
        )
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(strict=False))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        if name in without_state:
            # It had no gradient before the save; the zeros that stand in for its state must go.
            optimizer.state.pop(parameter, None)


def _report(
    directory: Path, metadata: Metadata, loaded: Iterable[str], not_loaded: list[str], others: list[str]
) -> None:
    n_in_optimizer = len({key.rpartition(".")[0] for key in loaded if key.startswith(OPTIMIZER_STATE)})
    done = ("iteration", "model", *(("optimizer",) if n_in_optimizer else ()), *others)
    left = sorted({key.partition(".")[0] for key in metadata.state_dict_metadata} - set(done))
    logger.info(
        "%s: loaded %d entries of the model, the optimizer state of %d parameters, and %s; "
        "in the checkpoint but not loaded: %s; in the model but not in the checkpoint: %s",
        directory,
        sum(key.startswith("model.") for key in loaded),
        n_in_optimizer,
        list_names(others, N_LISTED),
        list_names(left, N_LISTED),
        list_names(not_loaded, N_LISTED),
    )


def _shapes(metadata: Metadata, prefix: str) -> dict[str, torch.Size | None]:
    return {
        key: entry.size if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(f"{prefix}.")
    }
