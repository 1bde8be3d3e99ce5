"""Whether a whole configuration can be trained, found out before a model is built.

Names and types are `schema`'s part. Here are ranges of single values; what several keys say together is in
`rules_images` (crops, patches, masks), `rules_training` (data, batch, schedules) and `rules_teachers` (Gram anchoring,
distillation).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import OmegaConf

from dinov3 import distributed
from dinov3.configs import rules_images, rules_teachers, rules_training, schema
from dinov3.configs.merging import joined, plain, wrong_values
from dinov3.configs.schema import ConfigError

logger = logging.getLogger("dinov3")

#: What a number (or each number of a list) must be, and the keys that this holds for. Null is left alone.
RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "at least 1",
        lambda value: value >= 1,
        (
            "dino.head_n_prototypes",
            "dino.head_bottleneck_dim",
            "dino.head_nlayers",
            "dino.head_hidden_dim",
            "dino.koleo_topk",
            "dino.koleo_distributed_loss_group_size",
            "ibot.head_n_prototypes",
            "ibot.head_bottleneck_dim",
            "ibot.head_nlayers",
            "ibot.head_hidden_dim",
            "gram.update_frequency",
            "train.batch_size_per_gpu",
            "train.grad_accumulation_steps",
            "train.OFFICIAL_EPOCH_LENGTH",
            "train.print_freq",
            "student.patch_size",
            "student.in_chans",
            "student.pos_embed_rope_jitter_coords",
            "student.pos_embed_rope_rescale_coords",
            "multidistillation.global_batch_size",
            "crops.local_crops_number",
            "crops.global_crops_size",
            "crops.local_crops_size",
            "crops.gram_teacher_crops_size",
            "checkpointing.period",
            "checkpointing.max_to_keep",
            "checkpointing.keep_every",
        ),
    ),
    (
        "more than 0",
        lambda value: value > 0,
        (
            "student.ffn_ratio",
            "student.pos_embed_rope_base",
            "student.pos_embed_rope_min_period",
            "student.pos_embed_rope_max_period",
            "optim.epochs",
            "crops.global_local_crop_pairs_ratios",
            "crops.rgb_std",
            "crops.teacher_to_student_resolution_scale",
            "checkpointing.max_seconds",
        ),
    ),
    (
        "0 or more",
        lambda value: value >= 0,
        (
            "dino.loss_weight",
            "dino.koleo_loss_weight",
            "ibot.loss_weight",
            "gram.loss_weight",
            "gram.it_first_update",
            "gram.max_updates",
            "train.seed",
            "train.num_workers",
            "train.max_nonfinite_steps",
            "student.n_storage_tokens",
            "student.layerscale",
            "student.pos_embed_rope_shift_coords",
            "optim.weight_decay",
            "optim.weight_decay_end",
            "optim.lr",
            "optim.min_lr",
            "optim.warmup_epochs",
            "optim.freeze_last_layer_epochs",
            "optim.freeze_backbone_epochs",
            "optim.schedule_trunc_extra",
            "optim.clip_grad",
            "optim.patch_embed_lr_mult",
            "optim.dino_head_wd_multiplier",
            "teacher.warmup_teacher_temp_epochs",
        ),
    ),
    (
        "between 0 and 1",
        lambda value: 0 <= value <= 1,
        (
            "ibot.mask_sample_probability",
            "teacher.momentum_teacher",
            "teacher.final_momentum_teacher",
            "crops.blur_probabilities",
        ),
    ),
    (
        "at least 0 and less than 1",
        lambda value: 0 <= value < 1,
        ("student.drop_path_rate", "optim.adamw_beta1", "optim.adamw_beta2"),
    ),
    (
        "more than 0 and at most 1",
        lambda value: 0 < value <= 1,
        ("optim.layerwise_decay", "crops.global_crops_scale", "crops.local_crops_scale"),
    ),
)

LENGTHS = {
    "ibot.mask_ratio_min_max": 2,
    "crops.global_crops_scale": 2,
    "crops.local_crops_scale": 2,
    "crops.rgb_mean": 3,
    "crops.rgb_std": 3,
    "crops.blur_probabilities": 3,
}

RULES = (
    rules_images.crop_sizes,
    rules_images.mask_grid,
    rules_images.mask_ratios,
    rules_images.crop_scales,
    rules_images.rope,
    rules_training.data,
    rules_training.start,
    rules_training.head_and_centering,
    rules_training.batch,
    rules_training.koleo,
    rules_training.fp8,
    rules_training.schedules_v1,
    rules_training.schedules_v2,
    rules_training.loss_weight_schedules,
    rules_teachers.gram,
    rules_teachers.gram_teacher_source,
    rules_teachers.distillation,
    rules_teachers.multidistillation,
    rules_teachers.retired_sections,
)


def validate(cfg: Any, world_size: int | None = None) -> None:
    """Check a complete configuration, as far as that is possible without data, weights and a model.

    Args:
        cfg: the default configuration merged with a recipe and options.
        world_size: number of processes that train together; None: of this job.

    Raises:
        ConfigError: names every problem with its key, its value, and what to do.
    """
    problems = find_problems(cfg, world_size)
    if problems:
        raise ConfigError(joined(problems))


def find_problems(cfg: Any, world_size: int | None = None) -> list[str]:
    """One sentence for each reason why `cfg` cannot be trained; see `validate`."""
    if not OmegaConf.is_config(cfg):
        cfg = OmegaConf.create(cfg)
    leaves = dict(schema.flatten(plain(cfg)))
    problems = [problem for key, value in leaves.items() if (problem := schema.key_problem(key, value))]
    missing = [key for key in schema.default_values() if OmegaConf.select(cfg, key, default=schema) is schema]
    if missing:
        problems.append(f"missing {schema.listed(missing, 5)}: merge over get_default_config()")
    problems = problems or wrong_values(cfg) or [*_out_of_range(leaves), *rules_teachers.student_list(cfg)]
    # The rules may only rely on what has passed so far.
    if problems:
        return problems
    size = distributed.get_world_size() if world_size is None else world_size
    return list(itertools.chain.from_iterable(rule(cfg, size) for rule in RULES))


def find_notes(cfg: Any) -> list[str]:
    """Remarks on a valid configuration that may not do what its author expects."""
    return [*rules_images.notes(cfg), *rules_training.notes(cfg), *rules_teachers.notes(cfg)]


def _out_of_range(leaves: dict[str, Any]) -> Iterator[str]:
    for expected, is_in_range, keys in RANGES:
        for key in keys:
            value = leaves.get(key)
            entries = value if isinstance(value, list) else [value]
            if not all(entry is None or is_in_range(entry) for entry in entries):
                yield f"{key}={schema.as_text(value)}: must be {expected}"
    for key, length in LENGTHS.items():
        if len(leaves[key]) != length:
            yield f"{key}={schema.as_text(leaves[key])}: must have {length} entries"
