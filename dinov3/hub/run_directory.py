"""Where a training run keeps its configuration and what it saves, and which of its checkpoints is meant by a path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dinov3.utils.messages import list_names

#: Below the output directory of a run.
CONFIG_FILE = "config.yaml"
CHECKPOINT_DIRECTORY = "ckpt"
EVALUATION_DIRECTORY = "eval"
TEACHER_FILE = "teacher_checkpoint.pth"
SHARDED_TEACHER_DIRECTORY = "sharded_teacher_checkpoint"

LOOKED_FOR = (
    f"{EVALUATION_DIRECTORY}/training_*/{TEACHER_FILE}, {EVALUATION_DIRECTORY}/training_*/{SHARDED_TEACHER_DIRECTORY}, "
    f"{CHECKPOINT_DIRECTORY}/<iteration> and {TEACHER_FILE}"
)
SECTIONS = ("student", "crops")
#: A teacher lies in RUN, RUN/eval/training_<iteration> or RUN/ckpt/<iteration>.
_MAX_DEPTH = 3


def find_checkpoint(path: Path) -> Path:
    """Return the file or the directory of the checkpoint that a path means.

    Args:
        path: a training run, its `ckpt/` or `eval/`, or one directory in these, for the newest teacher below it;
            anything else is returned as it is.

    Raises:
        FileNotFoundError: a training run that has not saved a teacher.
    """
    if not path.is_dir() or (path / ".metadata").is_file():
        return path
    if is_run_config(path / CONFIG_FILE):
        return find_teacher(path)
    saved = _saved_teachers(path, "*", "training_*/*")
    return max(saved)[2] if saved else path


def find_teacher(run_dir: Path, iteration: int | None = None) -> Path:
    """Find the newest file or checkpoint directory in which a training run has saved its teacher.

    Args:
        run_dir: the output directory of the run.
        iteration: the one that it was saved after. Default: the last one.

    Raises:
        FileNotFoundError: there is none.
    """
    saved = _saved_teachers(run_dir, f"{CHECKPOINT_DIRECTORY}/*", f"{EVALUATION_DIRECTORY}/training_*/*")
    wanted = saved if iteration is None else [entry for entry in saved if entry[0] == iteration]
    if wanted:
        return max(wanted)[2]
    if iteration is not None:
        there = sorted({entry[0] for entry in saved})
        raise FileNotFoundError(f"{run_dir} has no teacher of iteration {iteration}; it has {there or 'none at all'}")
    if (run_dir / TEACHER_FILE).is_file():
        return run_dir / TEACHER_FILE
    raise FileNotFoundError(
        f"{run_dir} has not saved a teacher yet: looked for {LOOKED_FOR}; it holds "
        f"{list_names(sorted(path.name for path in run_dir.iterdir()), most=10)}"
    )


def _saved_teachers(directory: Path, *patterns: str) -> list[tuple[int, int, Path]]:
    # (iteration, preference, path): of the same iteration, the smaller form that needs less assembling is preferred.
    found = []
    for path in (path for pattern in patterns for path in directory.glob(pattern)):
        is_checkpoint = (path / ".metadata").is_file()
        exported = re.fullmatch(r"training_([0-9]+)", path.absolute().parent.name)
        if is_checkpoint and (match := re.fullmatch(r"(0|[1-9][0-9]*)(_keep)?", path.name)):
            found.append((int(match[1]), 0, path))
        elif exported and is_checkpoint and path.name == SHARDED_TEACHER_DIRECTORY:
            found.append((int(exported[1]), 1, path))
        elif exported and path.name == TEACHER_FILE:
            found.append((int(exported[1]), 2, path))
    return found


def find_run_config(path: Path) -> Path | None:
    """Return the configuration of the training run that `path` is, or lies in; None without a run."""
    path = path.expanduser().absolute()
    files = [directory / CONFIG_FILE for directory in (path, *path.parents[:_MAX_DEPTH])]
    return next((file for file in files if is_run_config(file)), None)


def is_run_config(file: Path) -> bool:
    """Return whether a file is the configuration of a training; many programs write a `config.yaml`."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return all(re.search(rf"^{section}:", text, re.MULTILINE) for section in SECTIONS)


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
    missing = [section for section in SECTIONS if section not in cfg]
    if missing:
        raise ValueError(f"{path} is not the configuration of a training: it has no section {' and no '.join(missing)}")
    return cfg
