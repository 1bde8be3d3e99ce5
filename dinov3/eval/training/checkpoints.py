"""Checkpoints of a head in training: `model_<iteration, 8 digits>.pth`, `best.pth` and at the end `model_final.pth`.

A file holds `model` (the head's state dict), `optimizer`, `iteration` and whatever else the training adds; files that
lack the latter, as the official release writes them, and bare state dicts of a head can be read too. No code in a file
is run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.utils.files import atomic_write, temporary_beside
from dinov3.utils.weight_files import WeightsError, read_file

FINAL_NAME = "model_final.pth"
BEST_NAME = "best.pth"  # sorts before the numbered files, so it is never taken for the newest
DDP_PREFIX = "module."


class Checkpoints:
    """The checkpoint files of one training.

    Args:
        directory: where they are; created when the first one is saved.
    """

    #: What a user can do about a checkpoint that does not fit, for error messages.
    advice = "choose another output_dir"

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def find_newest(self) -> Path | None:
        """Return the checkpoint to continue from, or None."""
        return find_latest_checkpoint(self.directory)

    def read(self, path: Path) -> dict[str, Any]:
        """Read what `save` was given, under the same names.

        Raises:
            WeightsError: the file is damaged, or holds a head but not the state of its training.
        """
        content, iteration = load_checkpoint(path)
        if iteration is None or "optimizer" not in content:
            raise WeightsError(
                f"{path} holds a head but not the state of its training, so there is nothing to continue: choose "
                "another output_dir, or move the file away; load_from=FILE evaluates it"
            )
        return {**content, "iteration": iteration}

    def save(self, content: Mapping[str, Any], *, is_due: bool, is_best: bool, is_last: bool) -> None:
        """Write a checkpoint; one process calls it.

        Args:
            content: `model`, `optimizer`, `iteration` and further entries, as state dicts and plain data.
            is_due: the training saves after this step, whatever the metrics; always true after the last one.
            is_best: the head is the best one so far.
            is_last: the training is finished.
        """
        path = _write(self.directory / checkpoint_name(content["iteration"]), content)
        for name, is_wanted in ((BEST_NAME, is_best), (FINAL_NAME, is_last)):
            if is_wanted:
                # Another name for the same file, in place of what had it; a copy where there are no hard links.
                temporary = temporary_beside(path.with_name(name))
                try:
                    os.link(path, temporary)
                except OSError:
                    shutil.copyfile(path, temporary)
                temporary.replace(path.with_name(name))


def checkpoint_name(iteration: int) -> str:
    """Return the file name of a checkpoint after `iteration` steps."""
    return f"model_{iteration:08d}.pth"


def save_checkpoint(
    path: str | os.PathLike[str],
    iteration: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    name: str | None = None,
) -> Path:
    """Write a checkpoint without a schedule into the directory `path`, by default named by its iteration."""
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}
    return _write(Path(path) / (name or checkpoint_name(iteration)), content)


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int | None]:
    """Read a checkpoint, or the bare state dict of a head.

    Returns:
        Its entries other than the iteration (`model`, and `optimizer` and more where there are such), tensors on the
        CPU, and the iteration, None if the file does not say.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is damaged, or not a checkpoint of a head.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such file")
    content = dict(read_file(path, mmap=False))
    if "model" not in content:
        content = {"model": content}
    if not isinstance(content["model"], Mapping) or not all(isinstance(t, Tensor) for t in content["model"].values()):
        raise WeightsError(f"{path} is not a checkpoint of a head: expected a state dict, or one under the key `model`")
    content["model"] = unwrap_ddp_state_dict(content["model"])
    iteration = content.pop("iteration", None)
    return content, None if iteration is None else int(iteration)


def find_latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return `model_final.pth` if it is there, otherwise the last `*.pth` by name, or None."""
    final = Path(folder) / FINAL_NAME
    if final.is_file():
        return final
    return max(Path(folder).glob("*.pth"), key=lambda path: path.name, default=None)


def unwrap_ddp_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """Remove one leading `module.` from the names, where all have it."""
    if state and all(name.startswith(DDP_PREFIX) for name in state):
        return {name.removeprefix(DDP_PREFIX): value for name, value in state.items()}
    return dict(state)


def copy_entries(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy a state dict, because a tensor that is a view would be stored with all that it is a view of."""
    return {name: tensor.detach().clone() for name, tensor in entries.items()}


def _write(target: Path, content: Mapping[str, Any]) -> Path:
    with atomic_write(target) as file:
        torch.save({**content, "model": unwrap_ddp_state_dict(copy_entries(content["model"]))}, file)
    return target
