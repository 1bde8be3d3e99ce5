"""Several students of one teacher: default < student's file < shared file < options, once for each student.

What the shared file says wins over the student's file, so a shared file must not describe a student.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from dinov3.configs.merging import (
    Layer,
    get_default_config,
    is_placeholder,
    load_yaml,
    merge_layers,
    plain,
    resolve_config_path,
)
from dinov3.configs.settings import as_list, flatten
from dinov3.configs.training_config import MULTI_DISTILLATION
from dinov3.utils.messages import did_you_mean

STUDENT_KEYS = ("name", "config_path", "ranks_range")

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


def merge_student(student: Any, layers: Sequence[Layer], *, strict: bool = True) -> DictConfig:
    """Return the configuration of a student.

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
    """Return the configuration of every student by name; see `merge_student`."""
    return {
        student.name: merge_student(student, layers, strict=strict) for student in shared.multidistillation.students
    }


def student_list_problems(cfg: Any) -> Iterator[str]:
    """Yield what is wrong with the form of `multidistillation.students`, one sentence for each problem."""
    for index, student in enumerate(cfg.multidistillation.get("students") or []):
        where = f"multidistillation.students[{index}]"
        if not isinstance(student, dict | DictConfig):
            yield f"{where}: expected name, config_path and ranks_range"
            continue
        for key in sorted(set(student) - set(STUDENT_KEYS)):
            hint = did_you_mean(str(key), STUDENT_KEYS) or f"; expected {', '.join(STUDENT_KEYS)}"
            yield f"{where}: unknown key {key!r}{hint}"
        for key in ("name", "config_path"):
            if not (isinstance(student.get(key), str) and student[key]):
                yield f"{where}.{key}={student.get(key)}: expected text"
        ranks = as_list(student.get("ranks_range"))
        if len(ranks) != 2 or not all(type(rank) is int for rank in ranks) or not 0 <= ranks[0] < ranks[1]:
            yield f"{where}.ranks_range={student.get('ranks_range')}: expected [first process, process after the last]"


def problems(cfg: Any, world_size: int) -> Iterator[str]:
    """Yield the reasons why the students cannot share the processes and the batch; a rule of `validation`."""
    section = cfg.multidistillation
    if not section.enabled:
        return
    if cfg.MODEL.META_ARCHITECTURE != MULTI_DISTILLATION:
        yield f"multidistillation.enabled=true needs MODEL.META_ARCHITECTURE={MULTI_DISTILLATION}"
    if not cfg.distillation.enabled:
        yield "multidistillation.enabled=true needs distillation.enabled=true"
    students, total = section.get("students"), section.get("global_batch_size")
    if not students:
        yield "multidistillation.students is not set: give a list of {name, config_path, ranks_range}"
        return
    if total is None:
        yield "multidistillation.global_batch_size is not set: give the number of images per step"
        return
    names = [student.name for student in students]
    if len(set(names)) < len(names):
        yield f"multidistillation.students: the names {', '.join(names)} are not all different"
    next_rank = 0
    for student in students:
        if is_placeholder(student.config_path):
            yield f"multidistillation.students: {student.name} has the placeholder {student.config_path}, give its file"
        first, end = student.ranks_range
        if first != next_rank:
            yield (
                f"multidistillation.students: {student.name} has processes from {first}, expected from {next_rank}; "
                "the ranges must follow each other without gaps"
            )
        if total % (end - first):
            yield (
                f"multidistillation.global_batch_size={total}: not divisible by the {end - first} processes of "
                f"{student.name}"
            )
        next_rank = end
    if total < next_rank:
        yield f"multidistillation.global_batch_size={total}: fewer images than the {next_rank} processes"


def shared_problems(shared: Any, world_size: int) -> list[str]:
    """Return what is wrong with the shared file itself, before its students are merged."""
    return [*student_list_problems(shared)] or [*problems(shared, world_size)]


def disagreements(students: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings that differ among students although they share the images, the teacher and every step.

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
