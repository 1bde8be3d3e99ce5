"""Checkpoints of a head in training: `model_<iteration, 8 digits>.pth`, `best.pth` and at the end `model_final.pth`.

Notable:
- A file holds `model` (entries of the head), `optimizer`, `iteration` and whatever else the training gives; files
  without the latter, as the official release writes them, and bare state dicts of a head, can be read.
- Files are written under a temporary name and renamed, and no code in them is run when they are read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.utils.files import fsync, temporary_beside
from dinov3.utils.weight_files import WeightsError, read_file

FINAL_NAME = "model_final.pth"
#: Sorts before the numbered files, so that it is never taken for the newest.
BEST_NAME = "best.pth"
DDP_PREFIX = "module."


def checkpoint_name(iteration: int) -> str:
    """File name of a checkpoint after `iteration` steps."""
    return f"model_{iteration:08d}.pth"


def save_checkpoint(
    path: str | os.PathLike[str],
    iteration: int,
    model: nn.Module | Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    name: str | None = None,
    **more: Any,
) -> Path:
    """Write a checkpoint, completely or not at all.

    Args:
        path: the directory, made if need be.
        iteration: steps that have been done.
        model: the head, or its entries.
        optimizer: its optimizer.
        name: of the file; None: by the iteration.
        **more: further entries, of plain data and tensors.

    Returns:
        The file.
    """
    target = Path(path) / (name or checkpoint_name(iteration))
    target.parent.mkdir(parents=True, exist_ok=True)
    entries = model.state_dict() if isinstance(model, nn.Module) else model
    content = {
        "model": unwrap_ddp_state_dict({key: value.detach().clone() for key, value in entries.items()}),
        "optimizer": optimizer.state_dict(),
        "iteration": iteration,
        **more,
    }
    temporary = temporary_beside(target)
    try:
        torch.save(content, temporary)
        fsync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def link(path: Path, name: Path) -> None:
    """Give a checkpoint another name, replacing what has it; a copy where there are no hard links."""
    temporary = temporary_beside(name)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        temporary.replace(name)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int | None]:
    """Read a checkpoint, or the bare state dict of a head.

    Returns:
        Its entries other than the iteration (`model`, and `optimizer` and more where there are such), tensors on the
        CPU, and the iteration, None if the file does not say.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is damaged, or no checkpoint of a head.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such file")
    content = dict(read_file(path, mmap=False))
    if "model" not in content:
        content = {"model": content}
    if not isinstance(content["model"], Mapping) or not all(isinstance(t, Tensor) for t in content["model"].values()):
        raise WeightsError(f"{path} is no checkpoint of a head: expected a state dict, or one under the key `model`")
    content["model"] = unwrap_ddp_state_dict(content["model"])
    iteration = content.pop("iteration", None)
    return content, None if iteration is None else int(iteration)


def find_latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """`model_final.pth` if it is there, else the last `*.pth` by name; None without any, or without the folder."""
    final = Path(folder) / FINAL_NAME
    if final.is_file():
        return final
    return max(Path(folder).glob("*.pth"), key=lambda path: path.name, default=None)


def unwrap_ddp_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries without one leading `module.`, where all have it."""
    if state and all(name.startswith(DDP_PREFIX) for name in state):
        return {name.removeprefix(DDP_PREFIX): value for name, value in state.items()}
    return dict(state)
