"""Whether a whole configuration can be trained, found out before a model is built.

Names, types, choices and ranges are declared in `training_config`. Here is what several keys say together: each rule
yields one sentence per problem, which names the key, its value and what to do.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from dinov3 import distributed
from dinov3.configs import multidistillation
from dinov3.configs.merging import is_placeholder, joined, load_teacher_config, plain, wrong_values
from dinov3.configs.scaling import count_iterations
from dinov3.configs.settings import ConfigError, as_list, key_problem, leaves_of
from dinov3.configs.training_config import (
    MULTI_DISTILLATION,
    REPLACED_BY_SCHEDULES,
    RETIRED,
    SETTINGS,
    TrainingConfig,
    default_values,
)
from dinov3.utils.messages import list_names

CONVNEXT_STRIDE = 32
STARTS = ("student.pretrained_weights", "student.resume_from_teacher_chkpt")
SCHEDULED = ("lr", "weight_decay", "momentum", "teacher_temp")


def validate(cfg: Any, world_size: int | None = None) -> None:
    """Check a complete configuration, as far as that is possible without data, weights and a model.

    Args:
        cfg: the default configuration merged with a recipe and options.
        world_size: number of processes that train together. Default: those of this job.

    Raises:
        ConfigError: names every problem with its key, its value, and what to do.
    """
    problems = find_problems(cfg, world_size)
    if problems:
        raise ConfigError(joined(problems))


def find_problems(cfg: Any, world_size: int | None = None) -> list[str]:
    """Return one sentence for each reason why `cfg` cannot be trained; see `validate`."""
    if not OmegaConf.is_config(cfg):
        cfg = OmegaConf.create(cfg)
    leaves = {key: value for key, value in leaves_of(TrainingConfig, plain(cfg)) if key not in RETIRED}
    problems = [problem for key, value in leaves.items() if (problem := key_problem(TrainingConfig, key, value))]
    # A section replaced by null, too, lacks its keys; a null setting does not.
    if missing := [key for key in default_values() if OmegaConf.select(cfg, key, default=SETTINGS) is SETTINGS]:
        problems.append(f"missing {list_names(missing)}: merge over get_default_config()")
    # Ranges may rely on the types, and the rules on everything before.
    problems = problems or list(wrong_values(cfg).values())
    if not problems:
        # An empty section, e.g. `schedules: {lr: null}`, is not a setting.
        ranges = (SETTINGS[key].range_problem(value) for key, value in leaves.items() if key in SETTINGS)
        problems = [problem for problem in ranges if problem] + [*multidistillation.student_list_problems(cfg)]
    if problems:
        return problems
    size = distributed.get_world_size() if world_size is None else world_size
    return list(itertools.chain.from_iterable(rule(cfg, size) for rule in RULES))


def _crop_sizes(cfg: Any, world_size: int) -> Iterator[str]:
    crops, patch = cfg.crops, stride(cfg.student)
    sizes = {key: as_list(crops[key]) for key in ("global_crops_size", "local_crops_size")}
    if crops.gram_teacher_crops_size is not None:
        sizes["gram_teacher_crops_size"] = as_list(crops.gram_teacher_crops_size)
    lengths = {key: len(entries) for key, entries in sizes.items()}
    lengths["global_local_crop_pairs_ratios"] = len(as_list(crops.global_local_crop_pairs_ratios))
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"crops.{key} has {length}" for key, length in lengths.items())
        yield f"lists of crop sizes must have equally many entries (a single value counts as 1): {found}"
    whole = sizes | {"local_crops_size": []} | ({} if cfg.gram.use_loss else {"gram_teacher_crops_size": []})
    for key, size in ((key, size) for key, entries in whole.items() for size in entries):
        if size % patch:
            below = size // patch * patch
            nearest = f"use {below} or {below + patch}" if below else f"use at least {patch}"
            yield f"crops.{key}={size}: must be a multiple of the patch size {patch}; {nearest}"
    for size in sizes["local_crops_size"]:
        if size < patch:
            yield f"crops.local_crops_size={size}: smaller than one patch of {patch} pixels"
    if crops.localcrops_subset_of_globalcrops:
        for outer, inner in zip(sizes["global_crops_size"], sizes["local_crops_size"], strict=False):
            if inner > outer:
                yield (
                    f"crops.localcrops_subset_of_globalcrops: a local crop of {inner} pixels cannot be cut out of a "
                    f"global crop of {outer}"
                )
            if inner % cfg.student.patch_size:
                yield (
                    f"crops.local_crops_size={inner}: with crops.localcrops_subset_of_globalcrops=true local crops lie "
                    f"on the grid of patches; use {inner // cfg.student.patch_size * cfg.student.patch_size}"
                )
    for key in ("global_crops_scale", "local_crops_scale"):
        low, high = crops[key]
        if low > high:
            yield f"crops.{key}=[{low}, {high}]: the smaller share of the image comes first"
    if cfg.student.in_chans != len(crops.rgb_mean):
        yield f"student.in_chans={cfg.student.in_chans}: training images have {len(crops.rgb_mean)} channels"


def _masks(cfg: Any, world_size: int) -> Iterator[str]:
    low, high = cfg.ibot.mask_ratio_min_max
    if not 0 <= low < high <= 1:
        yield f"ibot.mask_ratio_min_max=[{low}, {high}]: expected 0 <= smallest < largest <= 1"
    # Masks are drawn on a grid that must be that of the student's patches.
    student, patch, scale = cfg.student, stride(cfg.student), cfg.crops.teacher_to_student_resolution_scale
    key = f"crops.teacher_to_student_resolution_scale={scale}"
    mask_patch = int(student.patch_size * scale)
    if mask_patch < 1:
        yield f"{key}: too small for patches of {student.patch_size} pixels"
        return
    for size in as_list(cfg.crops.global_crops_size):
        mask_side, side = size // mask_patch, size // patch
        if size % patch == 0 and mask_side != side:
            yield (
                f"{key}: for global crops of {size} pixels masks would have {mask_side} x {mask_side} patches, but "
                f"{student.arch} has {side} x {side}; set it to {patch / student.patch_size:g}"
            )


def _student(cfg: Any, world_size: int) -> Iterator[str]:
    student = cfg.student
    base = student.pos_embed_rope_base
    shortest, longest = student.pos_embed_rope_min_period, student.pos_embed_rope_max_period
    if (shortest is not None) + (longest is not None) != (2 if base is None else 0):
        yield (
            f"student.pos_embed_rope_base={base}, min_period={shortest}, max_period={longest}: give either only "
            "pos_embed_rope_base, or pos_embed_rope_min_period and pos_embed_rope_max_period with base null"
        )
    elif base is None and shortest >= longest:
        yield f"student.pos_embed_rope_min_period={shortest}: must be less than pos_embed_rope_max_period={longest}"
    if all(OmegaConf.select(cfg, key) for key in STARTS):
        yield (
            "student.pretrained_weights and student.resume_from_teacher_chkpt are both set: give the first for only a "
            "backbone, the second for the teacher of a training, heads included"
        )
    if not cfg.ibot.separate_head:
        yield "ibot.separate_head=false: patches always have a head of their own; set it to true"
    if student.fp8_enabled:
        if cfg.compute_precision.param_dtype == "fp16":
            yield (
                "student.fp8_enabled=true: its results are bfloat16, which compute_precision.param_dtype=fp16 does not "
                "mix with; set it to bf16 or fp32"
            )
        try:
            re.compile(student.fp8_filter)
        except re.error as error:
            yield f"student.fp8_filter={student.fp8_filter}: not a regular expression ({error})"


def _data(cfg: Any, world_size: int) -> Iterator[str]:
    if not cfg.train.dataset_path:
        yield "train.dataset_path is not set: give a dataset such as train.dataset_path=ImageFolder:root=DIRECTORY"
    for key in ("train.dataset_path", "train.output_dir", *STARTS):
        if is_placeholder(value := OmegaConf.select(cfg, key)):
            yield f"{key}={value}: this is a placeholder, give your own"


def _sharding(cfg: Any, world_size: int) -> Iterator[str]:
    if cfg.train.fsdp == "never" and world_size > 1:
        yield f"train.fsdp=never: {world_size} processes would have no common gradient; use auto"
    if cfg.train.fsdp == "never" and cfg.compute_precision.param_dtype != "fp32":
        yield (
            f"train.fsdp=never: it computes in float32, not in compute_precision.param_dtype="
            f"{cfg.compute_precision.param_dtype}; set that to fp32, or train.fsdp=auto"
        )


def _batch(cfg: Any, world_size: int) -> Iterator[str]:
    total, per_process = cfg.train.batch_size_per_gpu * world_size, cfg.train.batch_size_per_gpu
    if cfg.multidistillation.enabled:
        total = cfg.multidistillation.get("global_batch_size") or 0
        students = cfg.multidistillation.get("students") or []
        largest = max((last - first for first, last in (student.ranks_range for student in students)), default=1)
        per_process = max(total // largest, 1)
    if total < 2:
        yield (
            f"train.batch_size_per_gpu={cfg.train.batch_size_per_gpu} (processes: {world_size}): Sinkhorn balances the "
            "targets of a batch over the prototypes and needs at least 2 images"
        )
    dino = cfg.dino
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
    group = total if dino.koleo_distributed_loss_group_size is None else dino.koleo_distributed_loss_group_size
    if group % per_process or total % group:
        yield (
            f"dino.koleo_distributed_loss_group_size={group}: must be a multiple of the {per_process} images of a "
            f"process and divide the global batch of {total} (processes: {world_size})"
        )
    if dino.koleo_topk > group - 1:
        yield f"dino.koleo_topk={dino.koleo_topk}: in a group of {group} images each has only {group - 1} neighbours"


def _schedules(cfg: Any, world_size: int) -> Iterator[str]:
    optim, schedules = cfg.optim, cfg.get("schedules")
    if count_iterations(cfg, optim.epochs) < 1:
        yield (
            f"optim.epochs={optim.epochs}: less than one iteration, with train.OFFICIAL_EPOCH_LENGTH="
            f"{cfg.train.OFFICIAL_EPOCH_LENGTH} iterations per epoch"
        )
        return
    if schedules is None:
        if unset := [key for key in REPLACED_BY_SCHEDULES if OmegaConf.select(cfg, key) is None]:
            yield f"not set: {', '.join(unset)}; give them, or a section `schedules`"
        n_iterations = count_iterations(cfg, optim.epochs)
        if optim.warmup_epochs is not None and count_iterations(cfg, optim.warmup_epochs) > n_iterations:
            yield f"optim.warmup_epochs={optim.warmup_epochs}: longer than the run of optim.epochs={optim.epochs}"
    else:
        for name in SCHEDULED:
            if schedules.get(name) is None:
                yield f"schedules.{name} is missing: give start, peak, end and warmup_epochs"
            else:
                yield from _schedule(cfg, f"schedules.{name}")
    # Loss weights are checked only when they are used.
    if cfg.dino.reweight_dino_local_loss:
        yield from _schedule(cfg, "dino.local_loss_weight_schedule")
    if cfg.gram.use_loss and cfg.gram.loss_weight_schedule:
        yield from _schedule(cfg, "gram.loss_weight_schedule")


def _schedule(cfg: Any, name: str) -> Iterator[str]:
    section = OmegaConf.select(cfg, name)
    if missing := [member for member in ("start", "peak", "end", "warmup_epochs") if section.get(member) is None]:
        yield f"{name} lacks {', '.join(missing)}"
        return
    cosine = section.get("cosine_epochs") or 0
    planned = count_iterations(cfg, section.warmup_epochs) + count_iterations(cfg, cosine)
    if planned > count_iterations(cfg, cfg.optim.epochs):
        yield (
            f"{name}: {section.warmup_epochs} epochs of warm-up and {cosine} of cosine do not fit into "
            f"optim.epochs={cfg.optim.epochs}"
        )


def _gram(cfg: Any, world_size: int) -> Iterator[str]:
    gram, crops_size = cfg.gram, cfg.crops.gram_teacher_crops_size
    if not gram.use_loss:
        return
    if cfg.MODEL.META_ARCHITECTURE == MULTI_DISTILLATION:
        yield f"gram.use_loss=true: not available with MODEL.META_ARCHITECTURE={MULTI_DISTILLATION}"
    if gram.tokens_used != "all" and gram.img_level:
        yield (
            f"gram.tokens_used={gram.tokens_used}: images have different numbers of such patches, so it needs "
            "gram.img_level=false"
        )
    if gram.remove_neg and gram.remove_only_teacher_neg:
        yield "gram.remove_neg and gram.remove_only_teacher_neg are both true: choose one"
    # Exactly one origin of the Gram teacher, its crops, and its presence whenever the loss counts.
    if gram.ema_teacher:
        if gram.ckpt is not None:
            yield f"gram.ckpt={gram.ckpt}: not used with gram.ema_teacher=true; set one of them back"
        if gram.rep_update:
            yield "gram.rep_update=true: with gram.ema_teacher=true there is nothing to refresh; set it to false"
        if crops_size is not None:
            yield f"crops.gram_teacher_crops_size={crops_size}: must be null with gram.ema_teacher=true"
        return
    if crops_size is None:
        yield "crops.gram_teacher_crops_size is null: give the size of the Gram teacher's crops"
    if gram.ckpt in ("ignore", "") or is_placeholder(gram.ckpt):
        yield f"gram.ckpt={gram.ckpt or repr('')}: this is a placeholder, give the Gram teacher's file: gram.ckpt=FILE"
    elif gram.ckpt is None and gram.it_load_ema_teacher < 0:
        yield (
            "the Gram teacher has no origin: give gram.ckpt=FILE, or gram.it_load_ema_teacher=N to copy the EMA "
            "teacher at iteration N, or gram.ema_teacher=true with gram.rep_update=false"
        )
    elif gram.ckpt is None and not _gram_weight_is_zero_before(cfg, gram.it_load_ema_teacher):
        yield (
            f"gram.it_load_ema_teacher={gram.it_load_ema_teacher}: the Gram loss counts before there is a Gram "
            "teacher; give gram.ckpt=FILE, or a gram.loss_weight_schedule that is 0 until then"
        )


def _gram_weight_is_zero_before(cfg: Any, iteration: int) -> bool:
    schedule = cfg.gram.loss_weight_schedule
    if not schedule:
        return iteration == 0 or cfg.gram.loss_weight == 0
    if schedule.get("start") != 0 or schedule.get("warmup_epochs") is None:
        return iteration == 0
    warmup = count_iterations(cfg, schedule.warmup_epochs)
    if schedule.get("peak") != 0:
        # The linear rise is 0 at its first iteration only.
        return iteration <= min(warmup, 1)
    # A cosine begins with the peak, so it adds one iteration of weight 0.
    has_cosine = schedule.get("cosine_epochs") is None or schedule.cosine_epochs > 0
    return schedule.get("end") == 0 or iteration <= warmup + has_cosine


def _distillation(cfg: Any, world_size: int) -> Iterator[str]:
    if cfg.hrft.enabled or cfg.hrft.checkpoint_path:
        yield "hrft is retired: give the teacher's file as student.resume_from_teacher_chkpt=FILE"
    if not cfg.distillation.enabled:
        if cfg.MODEL.META_ARCHITECTURE == MULTI_DISTILLATION:
            yield f"MODEL.META_ARCHITECTURE={MULTI_DISTILLATION} needs distillation.enabled=true"
        return
    checkpoint, path = cfg.distillation.checkpoint_path, cfg.distillation.full_cfg_path
    if not checkpoint:
        yield "distillation.checkpoint_path is not set: give the teacher's file, or ignore to test with random weights"
    elif is_placeholder(checkpoint):
        yield f"distillation.checkpoint_path={checkpoint}: this is a placeholder, give your own"
    if not path or is_placeholder(path):
        yield f"distillation.full_cfg_path={path or repr('')}: give the configuration file of the teacher's training"
        return
    try:
        teacher = load_teacher_config(path)
    except (FileNotFoundError, ConfigError) as error:
        yield f"distillation.full_cfg_path: {error}"
        return
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


def stride(student: Any) -> int:
    """Return the pixels per side of a feature of the network that the section `student` describes."""
    return CONVNEXT_STRIDE if student.arch.startswith("convnext") else student.patch_size


RULES = (
    _crop_sizes,
    _masks,
    _student,
    _data,
    _batch,
    _sharding,
    _schedules,
    _gram,
    _distillation,
    multidistillation.problems,
)
