"""One configuration per student of a multi-distillation: default < student's file < shared file < options.

What the shared file says wins over the student's file, so a shared file must not describe a student.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinov3 import distributed
from dinov3.configs import rules_teachers
from dinov3.configs.merging import (
    Layer,
    get_default_config,
    joined,
    layers_of,
    load_yaml,
    merge_layers,
    plain,
    resolve_config_path,
)
from dinov3.configs.schema import ConfigError, flatten
from dinov3.configs.setup import check_and_write
from dinov3.logging import cleanup_logging, setup_logging
from dinov3.utils import fix_random_seeds

logger = logging.getLogger("dinov3")

#: Students that differ in these would see other images than they are taught about, or wait for each other for ever.
COMMON_SETTINGS = (
    "compute_precision.param_dtype",
    "crops.",
    "distillation.",
    "optim.epochs",
    "train.OFFICIAL_EPOCH_LENGTH",
    "train.cache_dataset",
    "train.dataset_path",
    "train.grad_accumulation_steps",
    "train.on_bad_image",
    "train.seed",
    "checkpointing.period",
)


def setup_multidistillation(args: Any, strict_cfg: bool = True) -> DictConfig:
    """Divide the processes among the students, and set up that of this process.

    Its log, configuration and results go to `<output directory>/<name of the student>`. The process is seeded with
    `train.seed` plus its rank.

    Args:
        args: a `DinoV3SetupArgs` whose file has the sections `multidistillation` and `distillation`, and an output
            directory.
        strict_cfg: unknown keys are errors instead of warnings.

    Returns:
        The configuration of this process's student, its learning rate scaled.

    Raises:
        FileNotFoundError: the shared file or a student's is not there.
        ConfigError: the file describes no students, they need another number of processes, or a student's configuration
            cannot be trained.
        RuntimeError: the output directory cannot be written.
    """
    layers = layers_of(args)
    shared = merge_layers(get_default_config(), layers, strict=strict_cfg)
    _check_students(shared, distributed.get_world_size())
    if problems := [*disagreements(merge_students(shared, layers, strict=strict_cfg))]:
        raise ConfigError(joined(problems))
    section = shared.multidistillation
    distributed.new_subgroups([range(*student.ranks_range) for student in section.students])
    rank = distributed.get_rank()
    student = next(student for student in section.students if rank in range(*student.ranks_range))

    output_dir = str(Path(shared.train.output_dir) / student.name)
    follows = {
        "train": {
            "output_dir": output_dir,
            "batch_size_per_gpu": section.global_batch_size // distributed.get_world_size(),
        }
    }
    cfg = merge_student(student, [*layers, Layer("the students", OmegaConf.create(follows))], strict=strict_cfg)
    cleanup_logging()
    setup_logging(output=output_dir, level=logging.INFO)
    fix_random_seeds(cfg.train.seed + rank)
    logger.info("student %s: processes %d to %d, %s", student.name, *_first_and_last(student), output_dir)
    return check_and_write(cfg)


def merge_student(student: Any, layers: Sequence[Layer], *, strict: bool = True) -> DictConfig:
    """The configuration of a student.

    Args:
        student: an entry of `multidistillation.students`.
        layers: the shared file and the options.
        strict: unknown keys are errors instead of warnings.

    Raises:
        FileNotFoundError: `config_path` is not there.
        ConfigError: the settings cannot be merged.
    """
    path = resolve_config_path(student.config_path)
    return merge_layers(get_default_config(), [Layer(os.fspath(path), load_yaml(path)), *layers], strict=strict)


def merge_students(shared: Any, layers: Sequence[Layer], *, strict: bool = True) -> dict[str, DictConfig]:
    """The configuration of every student by name; see `merge_student`."""
    return {
        student.name: merge_student(student, layers, strict=strict) for student in shared.multidistillation.students
    }


def disagreements(students: Mapping[str, Any]) -> Iterator[str]:
    """Settings that differ among students although they share the images, the teacher and every step.

    Args:
        students: their configurations by name.
    """
    settings = {name: dict(flatten(plain(cfg))) for name, cfg in students.items()}
    for key in dict.fromkeys(key for values in settings.values() for key in values):
        if not key.startswith(COMMON_SETTINGS):
            continue
        names = {str(values.get(key)): name for name, values in reversed(settings.items())}
        if len(names) > 1:
            found = ", ".join(f"{value} for {name}" for value, name in reversed(names.items()))
            yield f"{key}={found}: all students must have the same, give it in the shared file"


def _check_students(shared: DictConfig, world_size: int) -> None:
    if not shared.multidistillation.enabled:
        raise ConfigError("--multi-distillation needs a configuration with multidistillation.enabled=true")
    problems = [*rules_teachers.student_list(shared)] or [*rules_teachers.multidistillation(shared, world_size)]
    if problems:
        raise ConfigError(joined(problems))
    n_needed = shared.multidistillation.students[-1].ranks_range[1]
    if n_needed != world_size:
        raise ConfigError(
            f"multidistillation.students: their ranks_range name {n_needed} processes, but this job has {world_size}: "
            f"start it with {n_needed}, or change the ranges"
        )


def _first_and_last(student: Any) -> tuple[int, int]:
    return student.ranks_range[0], student.ranks_range[1] - 1
