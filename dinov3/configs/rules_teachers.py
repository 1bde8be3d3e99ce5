"""Rules about teachers: Gram anchoring, distillation, several students. Each yields one sentence per problem."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig

from dinov3.configs.merging import Layer, get_default_config, load_yaml, merge_layers, resolve_config_path
from dinov3.configs.rules_images import as_list, stride
from dinov3.configs.rules_training import is_placeholder
from dinov3.configs.schema import ConfigError

MULTI = "MultiDistillationMetaArch"
STUDENT_KEYS = ("name", "config_path", "ranks_range")


def gram(cfg: Any, world_size: int) -> Iterator[str]:
    """Combinations of the section `gram` that contradict each other."""
    gram = cfg.gram
    if not gram.use_loss:
        return
    if cfg.MODEL.META_ARCHITECTURE == MULTI:
        yield f"gram.use_loss=true: not available with MODEL.META_ARCHITECTURE={MULTI}"
    if gram.tokens_used != "all" and gram.img_level:
        yield (
            f"gram.tokens_used={gram.tokens_used}: images have different numbers of such patches, so it needs "
            "gram.img_level=false"
        )
    if gram.remove_neg and gram.remove_only_teacher_neg:
        yield "gram.remove_neg and gram.remove_only_teacher_neg are both true: choose one"


def gram_teacher_source(cfg: Any, world_size: int) -> Iterator[str]:
    """Exactly one origin of the Gram teacher, its crops, and its presence whenever the loss counts."""
    gram, crops_size = cfg.gram, cfg.crops.gram_teacher_crops_size
    if not gram.use_loss:
        return
    if gram.ema_teacher:
        if gram.ckpt is not None:
            yield f"gram.ckpt={gram.ckpt}: not used with gram.ema_teacher=true; set one of them back"
        if gram.rep_update:
            yield "gram.rep_update=true: with gram.ema_teacher=true there is nothing to refresh; set it to false"
        if crops_size is not None:
            yield f"crops.gram_teacher_crops_size={crops_size}: must be null with gram.ema_teacher=true"
        return
    if any(size is None for size in as_list(crops_size)):
        yield "crops.gram_teacher_crops_size is null: give the size of the Gram teacher's crops"
    if gram.ckpt in ("ignore", "") or is_placeholder(gram.ckpt):
        yield f"gram.ckpt={gram.ckpt or repr('')}: this is a placeholder, give the Gram teacher's file: gram.ckpt=FILE"
    elif gram.ckpt is None and gram.it_load_ema_teacher < 0:
        yield (
            "the Gram teacher has no origin: give gram.ckpt=FILE, or gram.it_load_ema_teacher=N to copy the EMA "
            "teacher at iteration N, or gram.ema_teacher=true with gram.rep_update=false"
        )
    elif gram.ckpt is None and not _weight_is_zero_before(cfg, gram.it_load_ema_teacher):
        yield (
            f"gram.it_load_ema_teacher={gram.it_load_ema_teacher}: the Gram loss counts before there is a Gram "
            "teacher; give gram.ckpt=FILE, or a gram.loss_weight_schedule that is 0 until then"
        )


def distillation(cfg: Any, world_size: int) -> Iterator[str]:
    """A frozen teacher whose targets fit the student."""
    if not cfg.distillation.enabled:
        if cfg.MODEL.META_ARCHITECTURE == MULTI:
            yield f"MODEL.META_ARCHITECTURE={MULTI} needs distillation.enabled=true"
        return
    checkpoint = cfg.distillation.checkpoint_path
    if not checkpoint:
        yield "distillation.checkpoint_path is not set: give the teacher's file, or ignore to test with random weights"
    elif is_placeholder(checkpoint):
        yield f"distillation.checkpoint_path={checkpoint}: this is a placeholder, give your own"
    path = cfg.distillation.full_cfg_path
    if not path or is_placeholder(path):
        yield f"distillation.full_cfg_path={path or repr('')}: give the configuration file of the teacher's training"
        return
    try:
        teacher = load_teacher_config(path)
    except (FileNotFoundError, ConfigError) as error:
        yield f"distillation.full_cfg_path: {error}"
        return
    yield from _teacher_fits(cfg, teacher)


def load_teacher_config(path: str) -> DictConfig:
    """The configuration of a teacher's training, over the defaults; keys that we do not know are warned of.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it does not parse or holds wrong values.
    """
    found = resolve_config_path(path)
    return merge_layers(get_default_config(), [Layer(str(found), load_yaml(found))], strict=False)


def student_list(cfg: Any) -> Iterator[str]:
    """Whether `multidistillation.students` is a list of {name, config_path, ranks_range: [first, past last]}."""
    for index, student in enumerate(cfg.multidistillation.get("students") or []):
        where = f"multidistillation.students[{index}]"
        if not isinstance(student, dict | DictConfig):
            yield f"{where}: expected name, config_path and ranks_range"
            continue
        for key in sorted(set(student) - set(STUDENT_KEYS)):
            nearest = difflib.get_close_matches(str(key), STUDENT_KEYS, n=1) or [", ".join(STUDENT_KEYS)]
            yield f"{where}: unknown key {key!r}; did you mean {nearest[0]}?"
        for key in ("name", "config_path"):
            if not (isinstance(student.get(key), str) and student[key]):
                yield f"{where}.{key}={student.get(key)}: expected text"
        ranks = as_list(student.get("ranks_range"))
        if len(ranks) != 2 or not all(type(rank) is int for rank in ranks) or not 0 <= ranks[0] < ranks[1]:
            yield f"{where}.ranks_range={student.get('ranks_range')}: expected [first process, process after the last]"


def multidistillation(cfg: Any, world_size: int) -> Iterator[str]:
    """The students share out all processes and the batch."""
    section = cfg.multidistillation
    if not section.enabled:
        return
    if cfg.MODEL.META_ARCHITECTURE != MULTI:
        yield f"multidistillation.enabled=true needs MODEL.META_ARCHITECTURE={MULTI}"
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


def retired_sections(cfg: Any, world_size: int) -> Iterator[str]:
    """Settings that would be silently without effect."""
    if cfg.hrft.enabled or cfg.hrft.checkpoint_path:
        yield "hrft is retired: give the teacher's file as student.resume_from_teacher_chkpt=FILE"


def notes(cfg: Any) -> Iterator[str]:
    """Gram crops that nobody looks at."""
    if cfg.crops.gram_teacher_crops_size is not None and not cfg.gram.use_loss:
        yield "crops.gram_teacher_crops_size has no effect with gram.use_loss=false"


def _teacher_fits(cfg: Any, teacher: Any) -> Iterator[str]:
    if not teacher.ibot.separate_head:
        yield "the teacher of distillation.full_cfg_path has ibot.separate_head=false; it must have a head for patches"
    for section, key in (("dino", "head_n_prototypes"), ("ibot", "head_n_prototypes"), ("student", "patch_size")):
        ours, theirs = cfg[section][key], teacher[section][key]
        if ours != theirs:
            yield f"{section}.{key}={ours}: the teacher of distillation.full_cfg_path has {theirs}; they must be equal"
    scale = cfg.crops.teacher_to_student_resolution_scale
    for size in as_list(cfg.crops.global_crops_size):
        side, teacher_side = size // stride(cfg.student), int(size / scale) // stride(teacher.student)
        if side != teacher_side:
            yield (
                f"crops.global_crops_size={size}: {cfg.student.arch} has {side} x {side} patches, the teacher "
                f"{teacher.student.arch} {teacher_side} x {teacher_side}; they must be equal"
            )


def _weight_is_zero_before(cfg: Any, iteration: int) -> bool:
    schedule = cfg.gram.loss_weight_schedule
    if not schedule:
        return iteration == 0 or cfg.gram.loss_weight == 0
    if schedule.get("start") != 0 or schedule.get("warmup_epochs") is None:
        return iteration == 0
    warmup = round(schedule.warmup_epochs * cfg.train.OFFICIAL_EPOCH_LENGTH)
    if schedule.get("peak") != 0:
        # The linear rise is 0 at its first iteration only.
        return iteration <= min(warmup, 1)
    # A cosine begins with the peak, so it adds one iteration of weight 0.
    has_cosine = schedule.get("cosine_epochs") is None or schedule.cosine_epochs > 0
    return schedule.get("end") == 0 or iteration <= warmup + has_cosine
