"""The teacher of a training run as a file that evaluations and the hub load."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.checkpointer import save_checkpoint
from dinov3.fsdp import full_state_dict
from dinov3.hub.runs import EVALUATION_DIRECTORY, SHARDED_TEACHER_DIRECTORY, TEACHER_FILE
from dinov3.train.ssl_meta_arch import SSLMetaArch


def export_teacher(model: SSLMetaArch, output_dir: Path, iteration: int, *, sharded: bool = False) -> Path:
    """Write the EMA teacher after `iteration` to `<output_dir>/eval/training_<iteration>/`.

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
        _save_file(path, full_state_dict(model.model_ema))
    if distributed.is_subgroup_main_process():
        _link_newest(output_dir / TEACHER_FILE, path)
    return path


def export_path(output_dir: Path, iteration: int, *, sharded: bool = False) -> Path:
    """Where `export_teacher` writes the teacher after `iteration`."""
    directory = output_dir / EVALUATION_DIRECTORY / f"training_{iteration}"
    return directory / (SHARDED_TEACHER_DIRECTORY if sharded else TEACHER_FILE)


def _save_file(path: Path, state: dict[str, Tensor]) -> None:
    if distributed.is_subgroup_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}")
        torch.save({"teacher": state}, temporary)
        temporary.replace(path)


def _link_newest(link: Path, target: Path) -> None:
    temporary = link.with_name(f".tmp-{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    temporary.replace(link)
