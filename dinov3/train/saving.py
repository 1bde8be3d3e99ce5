"""When and how a run saves itself: checkpoints by iterations and by the clock, and exports of the teacher.

Notable: one failed checkpoint (a full disk, say) is logged and the run continues with those that it has; a second one
in a row ends it. With `checkpointing.async_save` a failure is noticed at a later step, at the same one on all ranks.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dinov3 import distributed
from dinov3.checkpointer import (
    BackgroundSaver,
    CheckpointError,
    find_latest_checkpoint,
    keep_checkpoint_copy,
    keep_last_n_checkpoints,
    save_checkpoint,
)
from dinov3.data.fingerprint import DataFingerprint
from dinov3.fsdp import full_state_dict
from dinov3.hub.run_directory import EVALUATION_DIRECTORY, SHARDED_TEACHER_DIRECTORY, TEACHER_FILE
from dinov3.train.resuming import run_metadata
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.utils.files import atomic_write, temporary_beside

logger = logging.getLogger("dinov3")


class Saver:
    """Write the checkpoints of a run into `root` and delete old ones; all ranks make the same calls.

    Args:
        cfg: the training configuration, of which `checkpointing` is used.
        root: directory of the checkpoints.

    Attributes:
        newest: the iteration of the last save that did not fail; None before.
        data: what the training data are, which checkpoints remember; None if nobody knows.
    """

    def __init__(self, cfg: Any, root: Path) -> None:
        self.cfg = cfg
        self.root = root
        self.newest: int | None = None
        self.data: DataFingerprint | None = None
        self._in_background = BackgroundSaver() if cfg.checkpointing.async_save else None
        self._started: int | None = None
        self._last_time = time.monotonic()
        self._failed_before = False

    @property
    def is_due(self) -> bool:
        """Whether `checkpointing.max_seconds` are over; only the main process looks at its clock."""
        most = self.cfg.checkpointing.max_seconds
        return most is not None and distributed.is_main_process() and time.monotonic() - self._last_time >= most

    @property
    def is_running(self) -> bool:
        """Whether this rank still writes a checkpoint in the background."""
        return self._in_background is not None and self._in_background.is_running

    def save(self, iteration: int, *, model: nn.Module, optimizer: Optimizer, **others: Any) -> None:
        """Write, or begin to write, `<root>/<iteration>`, once the save before is complete.

        Raises:
            CheckpointError: the second failure in a row.
        """
        self.finish()
        self._last_time = time.monotonic()
        contents = {"iteration": iteration, "model": model, "optimizer": optimizer, **others}
        write = save_checkpoint if self._in_background is None else self._in_background.start
        try:
            write(self.root / str(iteration), metadata=run_metadata(self.cfg, self.data), **contents)
        except CheckpointError as error:
            self._tolerate(error)
            return
        self._started = iteration
        if self._in_background is None:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in progress, if there is one, and delete the checkpoints that it makes superfluous.

        Raises:
            CheckpointError: it failed, as the one before did.
        """
        if self._started is None:
            return
        iteration, self._started = self._started, None
        try:
            if self._in_background is not None:
                self._in_background.wait()
        except CheckpointError as error:
            self._tolerate(error)
            return
        self._failed_before = False
        self.newest = iteration
        if distributed.is_subgroup_main_process():
            keep_last_n_checkpoints(self.root, self.cfg.checkpointing.max_to_keep)
            if (iteration + 1) % self.cfg.checkpointing.keep_every == 0:
                keep_checkpoint_copy(self.root / str(iteration))

    def _tolerate(self, error: CheckpointError) -> None:
        newest = find_latest_checkpoint(self.root) or "none yet"
        if self._failed_before:
            raise CheckpointError(f"{error}. It is the second failure in a row; newest checkpoint: {newest}") from error
        self._failed_before = True
        text = "%s; training continues and tries again at the next checkpoint (newest checkpoint: %s)"
        logger.error(text, error, newest)


def export_teacher(model: SSLMetaArch, output_dir: Path, iteration: int, *, sharded: bool = False) -> Path:
    """Write the EMA teacher after `iteration` for evaluations and the hub: `<output_dir>/eval/training_<iteration>/`.

    A file holds `{"teacher": {...}}` with full float32 tensors under `backbone.*`, `dino_head.*`, `ibot_head.*`.
    `<output_dir>/teacher_checkpoint.pth` links to the newest file or directory. Nothing appears under its final name
    before it is complete.

    Args:
        model: the meta-architecture.
        output_dir: the run's directory.
        iteration: the iteration that was just finished.
        sharded: write a distributed-checkpoint directory instead; every process writes its shards.

    Returns:
        The file or directory.
    """
    path = export_path(output_dir, iteration, sharded=sharded)
    if sharded:
        save_checkpoint(path, iteration=iteration, model=model.model_ema)
    else:
        # Every process takes part, though only one writes the file.
        state = full_state_dict(model.model_ema)
        if distributed.is_subgroup_main_process():
            with atomic_write(path) as file:
                torch.save({"teacher": state}, file)
    if distributed.is_subgroup_main_process():
        link = output_dir / TEACHER_FILE
        temporary = temporary_beside(link)
        temporary.symlink_to(os.path.relpath(path, output_dir))
        temporary.replace(link)
    return path


def export_path(output_dir: Path, iteration: int, *, sharded: bool = False) -> Path:
    """Return where `export_teacher` writes the teacher after `iteration`."""
    directory = output_dir / EVALUATION_DIRECTORY / f"training_{iteration}"
    return directory / (SHARDED_TEACHER_DIRECTORY if sharded else TEACHER_FILE)
