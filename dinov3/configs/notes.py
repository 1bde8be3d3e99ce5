"""Settings of a valid configuration that have no effect, or not the one that their author expects.

Each rule yields one sentence per finding, which names the key. They are warnings, not errors: published recipes and
short trials have such settings on purpose.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from dinov3.configs.merging import plain
from dinov3.configs.scaling import count_iterations
from dinov3.configs.settings import as_list, flatten
from dinov3.configs.training_config import SETTINGS, default_values
from dinov3.configs.validation import stride

#: Switches, the values that switch something off, and the settings (or sections) without effect then.
SWITCHES: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("train.checkpointing", False, ("train.checkpointing_full",)),
    ("train.compile", False, ("train.cudagraphs",)),
    ("gram.use_loss", False, ("gram", "crops.gram_teacher_crops_size", "crops.gram_teacher_no_distortions")),
    ("dino.reweight_dino_local_loss", False, ("dino.local_loss_weight_schedule",)),
    ("dino.koleo_loss_weight", 0, ("dino.koleo_loss_distributed", "dino.koleo_topk")),
    ("dino.koleo_loss_distributed", False, ("dino.koleo_distributed_loss_group_size",)),
    ("distillation.enabled", False, ("distillation.full_cfg_path", "distillation.checkpoint_path")),
    ("student.fp8_enabled", False, ("student.fp8_filter",)),
)
CONVNEXT_SETTINGS = ("arch", "patch_size", "pretrained_weights", "resume_from_teacher_chkpt", "in_chans")


def find_notes(cfg: Any) -> Iterator[str]:
    """Yield remarks on a valid configuration that may not do what its author expects."""
    return itertools.chain.from_iterable(rule(cfg) for rule in RULES)


def _crops(cfg: Any) -> Iterator[str]:
    patch = stride(cfg.student)
    for size in sorted(set(as_list(cfg.crops.local_crops_size))):
        if size % patch:
            yield (
                f"crops.local_crops_size: of {size} pixels the last {size % patch} rows and columns are not seen "
                f"(patches of {patch})"
            )


def _switched_off(cfg: Any) -> Iterator[str]:
    defaults = default_values()
    changed = [
        key
        for key, value in flatten(plain(cfg))
        if not (key in defaults and defaults[key] == value) and not (key in SETTINGS and SETTINGS[key].unused)
    ]
    for switch, off, settings in SWITCHES:
        if OmegaConf.select(cfg, switch) == off:
            idle = [key for key in changed if any(key == name or key.startswith(f"{name}.") for name in settings)]
            if idle := [key for key in idle if key != switch]:
                yield f"{', '.join(idle)} has no effect with {switch}={str(off).lower()}"
    if cfg.student.arch.startswith("convnext"):
        idle = [key for key in changed if key.startswith("student.") and key.split(".")[1] not in CONVNEXT_SETTINGS]
        # A rate of 0 is what a ConvNeXt has.
        if idle := [key for key in idle if OmegaConf.select(cfg, key)]:
            yield f"{', '.join(idle)} has no effect with student.arch={cfg.student.arch}"
    if cfg.gram.use_loss and cfg.gram.loss_weight_schedule and "gram.loss_weight" in changed:
        yield "gram.loss_weight has no effect with gram.loss_weight_schedule"


def _nothing_learned(cfg: Any) -> Iterator[str]:
    weights = {key: cfg[key].loss_weight for key in ("dino", "ibot")} | {"dino.koleo": cfg.dino.koleo_loss_weight}
    keys = ["dino.loss_weight", "dino.koleo_loss_weight", "ibot.loss_weight"]
    if cfg.gram.use_loss:
        schedule = cfg.gram.loss_weight_schedule
        weights["gram"] = _largest(schedule) if schedule else cfg.gram.loss_weight
        keys.append("gram.loss_weight_schedule" if schedule else "gram.loss_weight")
        if weights["gram"] == 0:
            yield f"gram.use_loss=true has no effect: {keys[-1]} is 0 during the whole run"
    if not any(weights.values()):
        yield f"{', '.join(keys)} are all 0: nothing is learned"
    key, rate = "optim.lr", cfg.optim.lr
    if cfg.get("schedules") is not None:
        key, rate = "schedules.lr", _largest(cfg.schedules.lr)
    if rate == 0:
        yield f"{key} is 0 during the whole run: nothing is learned"


def _largest(schedule: Any) -> float:
    return max(schedule.start, schedule.peak, schedule.end)


def _masks(cfg: Any) -> Iterator[str]:
    ibot, per_process = cfg.ibot, cfg.train.batch_size_per_gpu
    if cfg.multidistillation.enabled:
        sizes = [end - first for first, end in (student.ranks_range for student in cfg.multidistillation.students)]
        per_process = cfg.multidistillation.global_batch_size // max(sizes)
    if ibot.loss_weight == 0:
        return
    if int(2 * per_process * ibot.mask_sample_probability) == 0:
        yield (
            f"ibot.mask_sample_probability={ibot.mask_sample_probability}: none of the {2 * per_process} global crops "
            "of a process gets a mask, so ibot.loss_weight has no effect"
        )
    mask_patch = int(cfg.student.patch_size * cfg.crops.teacher_to_student_resolution_scale)
    for size in as_list(cfg.crops.global_crops_size):
        n_patches = (size // mask_patch) ** 2
        if int(n_patches * ibot.mask_ratio_min_max[1]) == 0:
            yield (
                f"ibot.mask_ratio_min_max={list(ibot.mask_ratio_min_max)}: less than one of the {n_patches} patches of "
                f"a global crop of {size} pixels is masked, so ibot.loss_weight has no effect"
            )


def _lengths(cfg: Any) -> Iterator[str]:
    epochs, teacher, optim = cfg.optim.epochs, cfg.teacher, cfg.optim
    key = "optim.freeze_last_layer_epochs" if cfg.get("schedules") is None else "schedules.lr.freeze_last_layer_epochs"
    frozen = OmegaConf.select(cfg, key) or 0
    if frozen >= epochs:
        yield f"{key}={frozen}: the last layers of the heads stay as they were initialised during the whole run"
    if optim.freeze_backbone_epochs >= epochs:
        yield f"optim.freeze_backbone_epochs={optim.freeze_backbone_epochs}: the backbone never learns in this run"
    is_warming_up = teacher.warmup_teacher_temp != teacher.teacher_temp
    if cfg.get("schedules") is None and is_warming_up and teacher.warmup_teacher_temp_epochs > epochs:
        yield (
            f"teacher.warmup_teacher_temp_epochs={teacher.warmup_teacher_temp_epochs}: longer than the run of "
            f"optim.epochs={epochs}, so teacher.teacher_temp={teacher.teacher_temp} is never reached"
        )
    gram, n_iterations = cfg.gram, count_iterations(cfg, epochs)
    if gram.use_loss and not gram.ema_teacher:
        if gram.it_load_ema_teacher >= n_iterations:
            yield f"gram.it_load_ema_teacher={gram.it_load_ema_teacher}: the run has only {n_iterations} iterations"
        first = -(-max(gram.it_first_update, 1) // gram.update_frequency) * gram.update_frequency
        if gram.rep_update and (first > n_iterations or gram.max_updates == 0):
            yield (
                f"gram.rep_update=true has no effect: with gram.it_first_update={gram.it_first_update}, "
                f"gram.update_frequency={gram.update_frequency} and gram.max_updates={gram.max_updates} there is no "
                f"refresh within {n_iterations} iterations"
            )


RULES = (_crops, _switched_off, _nothing_learned, _masks, _lengths)
