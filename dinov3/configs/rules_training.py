"""Rules about the course of a training: data, batch, losses, schedules. Each yields one sentence per problem."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dinov3.configs.merging import REPLACED_BY_SCHEDULES
from dinov3.configs.schema import SCHEDULED

N_GLOBAL_CROPS = 2
STARTS = ("pretrained_weights", "resume_from_teacher_chkpt")
SCHEDULE_MEMBERS = ("start", "peak", "end", "warmup_epochs")


def is_placeholder(value: Any) -> bool:
    """Whether a path is one of those that recipes leave to their user, such as `<PATH/TO/TEACHER>`."""
    return isinstance(value, str) and value.startswith("<") and value.endswith(">")


def data(cfg: Any, world_size: int) -> Iterator[str]:
    """There is a dataset, and no placeholder of a recipe is left."""
    if not cfg.train.dataset_path:
        yield "train.dataset_path is not set: give a dataset such as train.dataset_path=ImageFolder:root=DIRECTORY"
    for section, key in (("train", "dataset_path"), ("train", "output_dir"), *(("student", key) for key in STARTS)):
        if is_placeholder(cfg[section][key]):
            yield f"{section}.{key}={cfg[section][key]}: this is a placeholder, give your own"


def start(cfg: Any, world_size: int) -> Iterator[str]:
    """One origin of the student's weights."""
    if all(cfg.student[key] for key in STARTS):
        yield (
            "student.pretrained_weights and student.resume_from_teacher_chkpt are both set: give the first for a "
            "backbone alone, the second for the teacher of a training, heads included"
        )


def head_and_centering(cfg: Any, world_size: int) -> Iterator[str]:
    """The one head layout that exists."""
    if not cfg.ibot.separate_head:
        yield "ibot.separate_head=false: patches always have a head of their own; set it to true"


def batch(cfg: Any, world_size: int) -> Iterator[str]:
    """Sinkhorn and the neighbour search need company."""
    total = _global_batch_size(cfg, world_size)
    if total < 2:
        yield (
            f"train.batch_size_per_gpu={cfg.train.batch_size_per_gpu} (processes: {world_size}): Sinkhorn balances the "
            "targets of a batch over the prototypes and needs at least 2 images"
        )


def koleo(cfg: Any, world_size: int) -> Iterator[str]:
    """Every image has a neighbour, and groups are whole processes."""
    dino = cfg.dino
    per_process = _smallest_batch_per_process(cfg)
    if not dino.koleo_loss_distributed:
        if dino.koleo_topk != 1:
            yield f"dino.koleo_topk={dino.koleo_topk}: more than 1 neighbour needs dino.koleo_loss_distributed=true"
        if dino.koleo_loss_weight > 0 and per_process < 2:
            yield (
                "the KoLeo loss needs 2 images per process: raise train.batch_size_per_gpu, or set "
                "dino.koleo_loss_distributed=true or dino.koleo_loss_weight=0"
            )
        return
    if dino.koleo_distributed_replicas != 0:
        yield f"dino.koleo_distributed_replicas={dino.koleo_distributed_replicas}: retired, only 0 is accepted"
    total = _global_batch_size(cfg, world_size)
    group = total if dino.koleo_distributed_loss_group_size is None else dino.koleo_distributed_loss_group_size
    if group % per_process or total % group:
        yield (
            f"dino.koleo_distributed_loss_group_size={group}: must be a multiple of the {per_process} images of a "
            f"process and divide the global batch of {total} (processes: {world_size})"
        )
    if dino.koleo_topk > group - 1:
        yield f"dino.koleo_topk={dino.koleo_topk}: in a group of {group} images each has only {group - 1} neighbours"


def fp8(cfg: Any, world_size: int) -> Iterator[str]:
    """8-bit products have bfloat16 results, and their filter is a regular expression."""
    student = cfg.student
    if not student.fp8_enabled:
        return
    if cfg.compute_precision.param_dtype == "fp16":
        yield (
            "student.fp8_enabled=true: results are in bfloat16, which compute_precision.param_dtype=fp16 does not mix "
            "with; set it to bf16 or fp32"
        )
    try:
        re.compile(student.fp8_filter)
    except re.error as error:
        yield f"student.fp8_filter={student.fp8_filter}: not a regular expression ({error})"


def schedules_v1(cfg: Any, world_size: int) -> Iterator[str]:
    """Without a section `schedules`, `optim` and `teacher` are complete and the warm-up fits into the run."""
    if cfg.get("schedules") is not None:
        return
    unset = [key for key in REPLACED_BY_SCHEDULES if _at(cfg, key) is None]
    if unset:
        yield f"not set: {', '.join(unset)}; give them, or a section `schedules`"
    optim, teacher = cfg.optim, cfg.teacher
    if optim.warmup_epochs is not None and _iterations(cfg, optim.warmup_epochs) > _iterations(cfg, optim.epochs):
        yield f"optim.warmup_epochs={optim.warmup_epochs}: longer than the run of optim.epochs={optim.epochs}"
    for key in ("warmup_teacher_temp", "teacher_temp"):
        if teacher[key] is not None and teacher[key] <= 0:
            yield f"teacher.{key}={teacher[key]}: temperatures must be more than 0"


def schedules_v2(cfg: Any, world_size: int) -> Iterator[str]:
    """A section `schedules` is complete, and each of its schedules fits into the run."""
    schedules = cfg.get("schedules")
    if schedules is None:
        return
    for name in SCHEDULED:
        if schedules.get(name) is None:
            yield f"schedules.{name} is missing: give start, peak, end and warmup_epochs"
        else:
            yield from _schedule(cfg, schedules[name], f"schedules.{name}")
    for member in ("start", "peak", "end"):
        temperature = _at(cfg, f"schedules.teacher_temp.{member}")
        if temperature is not None and temperature <= 0:
            yield f"schedules.teacher_temp.{member}={temperature}: temperatures must be more than 0"
        momentum = _at(cfg, f"schedules.momentum.{member}")
        if momentum is not None and momentum > 1:
            yield f"schedules.momentum.{member}={momentum}: must be between 0 and 1"
    if (_at(cfg, "schedules.lr.freeze_last_layer_epochs") or 0) < 0:
        yield "schedules.lr.freeze_last_layer_epochs: must be 0 or more"


def loss_weight_schedules(cfg: Any, world_size: int) -> Iterator[str]:
    """Scheduled loss weights that are in use are complete and fit into the run."""
    if cfg.dino.reweight_dino_local_loss:
        yield from _schedule(cfg, cfg.dino.local_loss_weight_schedule, "dino.local_loss_weight_schedule")
    if cfg.gram.use_loss and cfg.gram.loss_weight_schedule:
        yield from _schedule(cfg, cfg.gram.loss_weight_schedule, "gram.loss_weight_schedule")


def notes(cfg: Any) -> Iterator[str]:
    """Switches without what they refine, and last layers that never learn."""
    for switch, needed in (("checkpointing_full", "checkpointing"), ("cudagraphs", "compile")):
        if cfg.train[switch] and not cfg.train[needed]:
            yield f"train.{switch} has no effect with train.{needed}=false"
    if cfg.get("schedules") is None:
        key, frozen = "optim.freeze_last_layer_epochs", cfg.optim.freeze_last_layer_epochs
    else:
        key, frozen = "schedules.lr.freeze_last_layer_epochs", cfg.schedules.lr.get("freeze_last_layer_epochs") or 0
    if frozen >= cfg.optim.epochs:
        yield f"{key}={frozen}: the last layers of the heads stay as they were initialised during the whole run"


def _schedule(cfg: Any, section: Any, name: str) -> Iterator[str]:
    missing = [member for member in SCHEDULE_MEMBERS if section.get(member) is None]
    if missing:
        yield f"{name} lacks {', '.join(missing)}"
        return
    for member in (*SCHEDULE_MEMBERS, "cosine_epochs"):
        if (section.get(member) or 0) < 0:
            yield f"{name}.{member}={section[member]}: must be 0 or more"
    cosine = section.get("cosine_epochs") or 0
    planned = _iterations(cfg, section.warmup_epochs) + _iterations(cfg, cosine)
    if planned > _iterations(cfg, cfg.optim.epochs):
        yield (
            f"{name}: {section.warmup_epochs} epochs of warm-up and {cosine} of cosine do not fit into "
            f"optim.epochs={cfg.optim.epochs}"
        )


def _global_batch_size(cfg: Any, world_size: int) -> int:
    if cfg.multidistillation.enabled:
        return cfg.multidistillation.get("global_batch_size") or 0
    return cfg.train.batch_size_per_gpu * world_size


def _smallest_batch_per_process(cfg: Any) -> int:
    if not cfg.multidistillation.enabled:
        return cfg.train.batch_size_per_gpu
    total = cfg.multidistillation.get("global_batch_size") or 0
    sizes = [student.ranks_range[1] - student.ranks_range[0] for student in cfg.multidistillation.get("students") or []]
    return max(total // max([*sizes, 1]), 1)


def _iterations(cfg: Any, epochs: float) -> int:
    return round(epochs * cfg.train.OFFICIAL_EPOCH_LENGTH)


def _at(cfg: Any, key: str) -> Any:
    value = cfg
    for name in key.split("."):
        value = value.get(name)
        if value is None:
            return None
    return value
