"""Backbones of training runs, and of whatever weights an evaluation is given.

Notable: neither needs a process group, a GPU or the code that trained; one process can read a checkpoint that many
wrote.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov3.distributed import runtime
from dinov3.hub.architectures import has_sizes_of
from dinov3.hub.run_directory import find_checkpoint, find_teacher, read_run_config
from dinov3.hub.sources import locate, naming_download
from dinov3.hub.weights import load_backbone_, read_state_dict
from dinov3.models import build_model_from_cfg

logger = logging.getLogger("dinov3")


def dinov3_from_run(
    run_dir: str | os.PathLike[str],
    *,
    iteration: int | None = None,
    device: torch.device | str = "cpu",
    mmap: bool | None = None,
) -> nn.Module:
    """Load the backbone of the newest teacher that a training run has saved.

    Args:
        run_dir: the output directory of the run. It must hold `config.yaml`, and at least one of
            `eval/training_<iteration>/teacher_checkpoint.pth`,
            `eval/training_<iteration>/sharded_teacher_checkpoint/`, `ckpt/<iteration>/` or `teacher_checkpoint.pth`.
        iteration: load the teacher that was saved after this iteration instead of the newest.
        device: where the model goes.
        mmap: True maps the teacher's file instead of reading it into memory: **then never write over it while the model
            lives. Write to another name and rename it.** Default: only if it has more than 4 GiB.

    Returns:
        The backbone that the configuration describes, in evaluation mode, its parameters trainable.

    Raises:
        FileNotFoundError: there is no such run, or it has not saved a teacher (after this iteration).
        ValueError: the configuration is not that of a training, or the teacher does not fit it.
        ModuleNotFoundError: the package omegaconf, which reads configurations, is missing.
    """
    run_dir = Path(run_dir).expanduser()
    cfg = read_run_config(run_dir)
    teacher = find_teacher(run_dir, iteration)
    model = load_from_config(cfg, teacher, mmap=mmap)
    logger.info("backbone of %s", teacher)
    return model.to(device).eval()


def build_model_for_eval(
    config: Any, pretrained_weights: str | os.PathLike[str] | None, shard_unsharded_model: bool = False
) -> nn.Module:
    """Build the backbone that a configuration describes, with given weights, on this process's device.

    Args:
        config: a training configuration with the sections `student` and `crops`.
        pretrained_weights: a file, a directory of a distributed checkpoint, a training run or a directory in it (the
            newest teacher there), or a URL; None or "" initialise at random.
        shard_unsharded_model: shard the model over the processes, as a training does; needs the whole configuration.

    Returns:
        The backbone in evaluation mode.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: the weights are unreadable, or not those of this model.
    """
    if not pretrained_weights:
        model, _ = build_model_from_cfg(config, only_teacher=True, fp8=False)
        model.to_empty(device=runtime.device())
        model.init_weights()
    else:
        path = locate(pretrained_weights)
        with naming_download(pretrained_weights, path):
            model = load_from_config(config, find_checkpoint(path)).to(runtime.device())
    model.eval()
    if shard_unsharded_model:
        # Imported here, because loading a backbone from the hub must not need it.
        from dinov3.fsdp import ac_compile_parallelize

        ac_compile_parallelize(nn.ModuleDict({"backbone": model}), [], config)
    return model


def load_from_config(cfg: Any, path: Path, *, mmap: bool | None = None) -> nn.Module:
    """Load weights into the backbone that a training's configuration describes.

    Args:
        cfg: with the sections `student` and `crops`.
        path: the weights, see `read_state_dict`.
        mmap: see `read_state_dict`.

    Returns:
        The backbone, on the CPU.

    Raises:
        WeightsError: the weights are unreadable, or not those of this model.
    """
    model, _ = build_model_from_cfg(cfg, only_teacher=True, fp8=False)
    state = read_state_dict(path, mmap=mmap, like=lambda: model)
    if cfg.student.get("ffn_ratio") is not None and not has_sizes_of(state, model):
        # Older configurations name a ratio that building the model ignored.
        from omegaconf import OmegaConf

        without_ratio = OmegaConf.merge(cfg, {"student": {"ffn_ratio": None}})
        other, _ = build_model_from_cfg(without_ratio, only_teacher=True, fp8=False)
        if has_sizes_of(state, other):
            logger.warning(
                "%s has the FFN of %s, not student.ffn_ratio=%s", path, cfg.student.arch, cfg.student.ffn_ratio
            )
            model = other
    target = f"student.arch={cfg.student.arch} of the configuration"
    return load_backbone_(model, state, source=str(path), target=target)
