"""Backbones of training runs, and of whatever weights an evaluation is given.

Notable: neither needs a process group, a GPU or the code that trained; one process can read a checkpoint that many
wrote.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov3.distributed import runtime
from dinov3.hub.sources import locate
from dinov3.hub.weights import load_backbone_, read_state_dict
from dinov3.models import build_model_from_cfg
from dinov3.utils.messages import list_names

logger = logging.getLogger("dinov3")

#: Where a training run keeps what it saves, below its output directory.
CONFIG_FILE = "config.yaml"
CHECKPOINT_DIRECTORY = "ckpt"
EVALUATION_DIRECTORY = "eval"
TEACHER_FILE = "teacher_checkpoint.pth"
SHARDED_TEACHER_DIRECTORY = "sharded_teacher_checkpoint"


def dinov3_from_run(
    run_dir: str | os.PathLike[str], *, iteration: int | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """Load the backbone of the newest teacher that a training run has saved.

    Args:
        run_dir: the output directory of the run. It must hold `config.yaml`, and at least one of
            `eval/training_<iteration>/teacher_checkpoint.pth`,
            `eval/training_<iteration>/sharded_teacher_checkpoint/`, `ckpt/<iteration>/` or `teacher_checkpoint.pth`.
        iteration: load the teacher that was saved after this iteration instead of the newest.
        device: where the model goes.

    Returns:
        The backbone that the configuration describes, in evaluation mode, its parameters trainable. A teacher file is
        mapped into memory: keep it in place while the model lives.

    Raises:
        FileNotFoundError: there is no such run, or it has not saved a teacher (after this iteration).
        ValueError: the configuration is not that of a training, or the teacher does not fit it.
        ModuleNotFoundError: the package omegaconf, which reads configurations, is missing.
    """
    run_dir = Path(run_dir).expanduser()
    cfg = read_run_config(run_dir)
    teacher = find_teacher(run_dir, iteration)
    model = _load(cfg, teacher)
    logger.info("backbone of %s", teacher)
    return model.to(device).eval()


def build_model_for_eval(
    config: Any, pretrained_weights: str | os.PathLike[str] | None, shard_unsharded_model: bool = False
) -> nn.Module:
    """Build the backbone that a configuration describes, with given weights, on this process's device.

    Args:
        config: a training configuration with the sections `student` and `crops`.
        pretrained_weights: a file, a directory of a distributed checkpoint, the directory of a training run (its newest
            teacher), or a URL; None or "" initialise at random.
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
        if (path / CONFIG_FILE).is_file():
            path = find_teacher(path)
        model = _load(config, path).to(runtime.device())
    model.eval()
    if shard_unsharded_model:
        # Imported here, because loading a backbone from the hub must not need it.
        from dinov3.fsdp import ac_compile_parallelize

        ac_compile_parallelize(nn.ModuleDict({"backbone": model}), [], config)
    return model


def find_teacher(run_dir: Path, iteration: int | None = None) -> Path:
    """Find the newest file or checkpoint directory in which a training run has saved its teacher.

    Args:
        run_dir: the output directory of the run.
        iteration: the one that it was saved after. Default: the last one.

    Raises:
        FileNotFoundError: there is none.
    """
    saved = _saved_teachers(run_dir)
    wanted = saved if iteration is None else [entry for entry in saved if entry[0] == iteration]
    if wanted:
        return max(wanted)[2]
    if iteration is not None:
        there = sorted({entry[0] for entry in saved})
        raise FileNotFoundError(f"{run_dir} has no teacher of iteration {iteration}; it has {there or 'none at all'}")
    if (run_dir / TEACHER_FILE).is_file():
        return run_dir / TEACHER_FILE
    raise FileNotFoundError(
        f"{run_dir} has not saved a teacher yet: looked for eval/training_*/{TEACHER_FILE}, "
        f"eval/training_*/{SHARDED_TEACHER_DIRECTORY}, ckpt/<iteration> and {TEACHER_FILE}; it holds "
        f"{list_names(sorted(path.name for path in run_dir.iterdir()), most=10)}"
    )


def _saved_teachers(run_dir: Path) -> list[tuple[int, int, Path]]:
    # (iteration, preference, path): of the same iteration, the smaller form that needs less assembling is preferred.
    found = []
    for path in (run_dir / CHECKPOINT_DIRECTORY).glob("*/.metadata"):
        if match := re.fullmatch(r"(0|[1-9][0-9]*)(_keep)?", path.parent.name):
            found.append((int(match[1]), 0, path.parent))
    for path in (run_dir / EVALUATION_DIRECTORY).glob("training_*/*"):
        match = re.fullmatch(r"training_([0-9]+)", path.parent.name)
        if match and path.name == SHARDED_TEACHER_DIRECTORY and (path / ".metadata").is_file():
            found.append((int(match[1]), 1, path))
        elif match and path.name == TEACHER_FILE:
            found.append((int(match[1]), 2, path))
    return found


def read_run_config(run_dir: Path) -> Any:
    """Read the configuration of a training run.

    Args:
        run_dir: its output directory.

    Raises:
        FileNotFoundError: there is no such run, or it has no configuration.
        ValueError: the configuration is not that of a training.
        ModuleNotFoundError: the package omegaconf is missing.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no training run at {run_dir}: there is no such directory")
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{run_dir} is not the output directory of a training run: it has no {CONFIG_FILE}; it holds "
            f"{list_names(sorted(path.name for path in run_dir.iterdir()), most=10)}"
        )
    try:
        from omegaconf import OmegaConf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to read the configuration of a training run: pip install omegaconf") from error
    cfg = OmegaConf.load(path)
    missing = [section for section in ("student", "crops") if section not in cfg]
    if missing:
        raise ValueError(f"{path} is not the configuration of a training: it has no section {' and no '.join(missing)}")
    return cfg


def _load(cfg: Any, path: Path) -> nn.Module:
    state = read_state_dict(path)
    model, _ = build_model_from_cfg(cfg, only_teacher=True, fp8=False)
    if cfg.student.get("ffn_ratio") is not None and not _fits(model, state):
        # Older configurations name a ratio that building the model ignored.
        from omegaconf import OmegaConf

        without_ratio = OmegaConf.merge(cfg, {"student": {"ffn_ratio": None}})
        other, _ = build_model_from_cfg(without_ratio, only_teacher=True, fp8=False)
        if _fits(other, state):
            logger.warning(
                "%s has the FFN of %s, not student.ffn_ratio=%s", path, cfg.student.arch, cfg.student.ffn_ratio
            )
            model = other
    target = f"student.arch={cfg.student.arch} of the configuration"
    return load_backbone_(model, state, source=str(path), target=target)


def _fits(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(state[name].shape == entry.shape for name, entry in model.state_dict().items() if name in state)
