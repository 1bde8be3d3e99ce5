"""Which configuration keys exist, and which values each may have.

The keys and most types come from `ssl_default_config.yaml`: a value must be of the type of its default. Only what the
defaults cannot say stands here: keys without a default, keys that also take null or a list, and closed sets of values.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

DEFAULT_CONFIG_PATH = Path(__file__).parent / "ssl_default_config.yaml"

VIT_ARCHITECTURES = (
    "vit_tiny",
    "vit_small",
    "vit_base",
    "vit_large",
    "vit_so400m",
    "vit_huge2",
    "vit_giant2",
    "vit_7b",
)
CONVNEXT_ARCHITECTURES = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")

#: Types that the default value does not tell. Alternatives are joined by " or ".
TYPES = {
    "dino.koleo_distributed_loss_group_size": "integer or null",
    "dino.local_loss_weight_schedule.warmup_epochs": "number",
    "gram.ckpt": "text or null",
    "gram.max_updates": "integer or null",
    "gram.loss_weight_schedule": "section or null",
    "train.dataset_path": "text or null",
    "train.data_config": "text or null",
    "train.chunk_schedule": "list",
    "student.layerscale": "number or null",
    "student.depth": "integer or null",
    "student.ffn_ratio": "number or null",
    "student.pos_embed_rope_base": "number or null",
    "student.pos_embed_rope_min_period": "number or null",
    "student.pos_embed_rope_max_period": "number or null",
    "student.pos_embed_rope_shift_coords": "number or null",
    "student.pos_embed_rope_jitter_coords": "number or null",
    "student.pos_embed_rope_rescale_coords": "number or null",
    "student.pretrained_weights": "text or null",
    "student.resume_from_teacher_chkpt": "text or null",
    "teacher.momentum_teacher": "number or null",
    "teacher.final_momentum_teacher": "number or null",
    "teacher.warmup_teacher_temp": "number or null",
    "teacher.teacher_temp": "number or null",
    "teacher.warmup_teacher_temp_epochs": "number or null",
    "distillation.full_cfg_path": "text or null",
    "distillation.checkpoint_path": "text or null",
    "hrft.checkpoint_path": "text or null",
    "optim.epochs": "number",
    "optim.weight_decay": "number or null",
    "optim.weight_decay_end": "number or null",
    "optim.lr": "number or null",
    "optim.warmup_epochs": "number or null",
    "optim.min_lr": "number or null",
    "optim.schedule_trunc_extra": "number or null",
    "optim.clip_grad": "number or null",
    "optim.freeze_last_layer_epochs": "number or null",
    "optim.freeze_backbone_epochs": "number",
    "optim.dump_fsdp_weights_path": "text or null",
    "crops.global_crops_size": "integer or list of integers",
    "crops.local_crops_size": "integer or list of integers",
    "crops.gram_teacher_crops_size": "integer or list of integers or null",
    "crops.global_local_crop_pairs_ratios": "number or list of numbers",
    "checkpointing.max_to_keep": "integer or null",
    "checkpointing.max_seconds": "number or null",
}

#: Keys that a configuration may have although the default configuration does not.
OPTIONAL = {
    "dino.local_loss_weight_schedule.cosine_epochs": "number or null",
    "multidistillation.global_batch_size": "integer",
    "multidistillation.students": "list",
    "schedules": "section or null",
    "schedules.lr.freeze_last_layer_epochs": "number or null",
}
SCHEDULED = ("lr", "weight_decay", "momentum", "teacher_temp")
for _section in ("gram.loss_weight_schedule", *(f"schedules.{name}" for name in SCHEDULED)):
    OPTIONAL |= {f"{_section}.{member}": "number" for member in ("start", "peak", "end", "warmup_epochs")}
    OPTIONAL[f"{_section}.cosine_epochs"] = "number or null"

_DTYPES = ("fp32", "fp16", "bf16")
CHOICES: dict[str, tuple[Any, ...]] = {
    "MODEL.META_ARCHITECTURE": ("SSLMetaArch", "MultiDistillationMetaArch"),
    "compute_precision.param_dtype": _DTYPES,
    "compute_precision.reduce_dtype": _DTYPES,
    "compute_precision.sharding_strategy": ("SHARD_GRAD_OP",),
    "gram.tokens_used": ("all", "masked", "unmasked"),
    "gram.global_teacher_resize_method": ("bicubic", "bilinear"),
    "train.centering": ("sinkhorn_knopp",),
    "train.attention": ("sdpa", "xformers"),
    "train.compile": (True, False, "auto"),
    "train.fsdp": ("auto", "always", "never"),
    "train.on_bad_image": ("raise", "skip"),
    "train.progress": (True, False, "auto"),
    "student.arch": VIT_ARCHITECTURES + CONVNEXT_ARCHITECTURES,
    "student.ffn_layer": ("mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"),
    "student.norm_layer": ("layernorm", "layernormbf16", "rmsnorm"),
    "student.pos_embed_type": ("rope", "ropenew"),
    "student.pos_embed_rope_normalize_coords": ("min", "max", "separate"),
    "student.pos_embed_rope_dtype": _DTYPES,
    "optim.optimizer": ("adamw",),
    "optim.scaling_rule": ("sqrt_wrt_1024", "linear_wrt_256", "none", None),
    "checkpointing.verify": (True, False, "auto"),
}

#: Default keys that nothing reads; setting them otherwise earns a warning.
WITHOUT_EFFECT = (
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.DTYPE",
    "dino.head_norm_last_layer",
    "dino.koleo_distributed_loss_group_data",
    "dino.force_weight_norm",
    "ibot.force_masking_even_with_zero_weight",
    "ibot.head_norm_last_layer",
    "train.data_config",
    "train.saveckp_freq",
    "train.monitor_gradient_norm",
    "train.chunk_schedule",
    "train.use_teacher_head",
    "train.learn_from_teacher_tokens",
    "teacher.in_chans",
    "optim.dump_fsdp_weights_path",
    "evaluation.low_freq_every",
    "evaluation.config_files.high_freq",
    "evaluation.config_files.low_freq",
)

#: Keys of published recipes that never did anything and are not in the default configuration.
RETIRED = (
    "coding_rate_loss.use_cls_loss",
    "coding_rate_loss.cls_loss_weight",
    "coding_rate_loss.use_masked_patches_loss",
    "coding_rate_loss.masked_patches_loss_weight",
    "coding_rate_loss.epsilon",
    "student.drop_path_uniform",
    "student.drop_path_shape",
    "student.patch_drop",
    "student.sin_cos_embeddings",
    "student.fourier_embeddings",
    "student.fourier_encoding_dim",
    "student.multiple_pos_embeddings",
    "student.cls_pos_embedding",
    "student.reg_pos_embedding",
    "student.block_chunks",
    "student.mask_attention",
    "student.mask_register_attention",
    "student.interpolate_offset",
    "student.interpolate_antialias",
    "student.init_std_cls",
    "student.init_std_reg",
    "student.rescale_weights_by_layer_id",
    "student.pos_embed_grid_size",
    "student.pos_embed_rope_gamma",
    "student.pos_embed_rope_init_multi_frequencies",
    "train.cell_augmentation",
    "train.cell_augmentation_type",
)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key or token, what was expected and what to do."""


@functools.cache
def default_values() -> dict[str, Any]:
    """The default configuration, flat: dotted key to value."""
    return dict(flatten(OmegaConf.to_container(OmegaConf.load(DEFAULT_CONFIG_PATH))))


@functools.cache
def known_types() -> dict[str, str]:
    """The type of every key that a configuration may have, as words of an error message."""
    types = {key: TYPES.get(key) or _type_of(value) for key, value in default_values().items()}
    return types | OPTIONAL


@functools.cache
def sections() -> frozenset[str]:
    """Every key that holds other keys, e.g. `train` and `schedules.lr`."""
    keys = [*known_types(), *RETIRED]
    return frozenset(".".join(parts[:n]) for parts in (key.split(".") for key in keys) for n in range(1, len(parts)))


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings as (dotted key, value); lists are leaves, and so are empty mappings."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def is_empty_section(key: str, value: Any) -> bool:
    """Whether `key` is a section that a file opens but leaves empty, which changes nothing."""
    return key in sections() and (value is None or value == {}) and key not in known_types()


def key_problem(key: str, value: Any) -> str | None:
    """What is wrong with the name of a key, None if it is known, retired or an empty section."""
    if key in known_types() or key in RETIRED or is_empty_section(key, value):
        return None
    if key in sections():
        members = sorted({known.removeprefix(f"{key}.") for known in known_types() if known.startswith(f"{key}.")})
        return f"{key!r} is a section, not a value: it holds {listed(members, 6)}"
    if parent := _leaf_above(key):
        return f"unknown key {key!r}: {parent!r} is a single value and holds no other keys"
    return f"unknown key {key!r}" + suggestion(key)


def breaks_structure(key: str) -> bool:
    """Whether a key makes a value of a section or a section of a value, so that it cannot even be ignored."""
    return key in sections() or _leaf_above(key) is not None


def _leaf_above(key: str) -> str | None:
    parts = key.split(".")
    above = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((found for found in above if found in known_types() and found not in sections()), None)


def suggestion(key: str) -> str:
    """A phrase that names the nearest known key, or nothing."""
    same_leaf = [known for known in known_types() if known.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = difflib.get_close_matches(key, known_types(), n=1, cutoff=0.75)
    nearest = nearest or same_leaf or difflib.get_close_matches(key, known_types(), n=1, cutoff=0.5)
    if not nearest:
        return "; `python -m dinov3.configs` prints all keys"
    return f"; did you mean {' or '.join(repr(found) for found in nearest[:3])}?"


def value_problem(key: str, value: Any) -> str | None:
    """What is wrong with the type of a value, or with a value from a closed set; None if it is fine."""
    if key in RETIRED or is_empty_section(key, value):
        return None
    if key in CHOICES:
        return choice_problem(key, value, CHOICES[key])
    expected = known_types()[key]
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key}={value}: expected a finite number"
    if any(_matches(value, alternative) for alternative in expected.split(" or ")):
        return None
    hint = ""
    if isinstance(value, str) and ("number" in expected or "integer" in expected):
        hint = " (this is text)"
    elif "text" in expected:
        hint = f" (quote it: {str(value)!r})"
    return f"{key}={as_text(value)}: expected {expected}{hint}"


def choice_problem(key: str, value: Any, choices: tuple[Any, ...]) -> str | None:
    """What is wrong with a value that must be one of `choices`; None if it is one."""
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return None
    names = [as_text(choice) for choice in choices]
    nearest = difflib.get_close_matches(str(value), names, n=1)
    expected = f"expected {names[0]}" if len(names) == 1 else f"expected one of {', '.join(names)}"
    return f"{key}={as_text(value)}: {expected}" + (f"; did you mean {nearest[0]}?" if nearest else "")


def as_text(value: Any) -> str:
    """A value as a configuration file or a `key=value` option would spell it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, list):
        return f"[{', '.join(as_text(entry) for entry in value)}]"
    return str(value) if value != "" else "''"


def listed(names: Iterable[str], most: int) -> str:
    """Names joined by commas, cut after `most`."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    return "list of numbers" if isinstance(value, list) else "text"


def _matches(value: Any, expected: str) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    is_number = is_integer or (isinstance(value, float) and math.isfinite(value))
    match expected:
        case "null":
            return value is None
        case "section":
            return value == {}
        case "true" | "false":
            return isinstance(value, bool)
        case "integer":
            return is_integer
        case "number":
            return is_number
        case "text":
            return isinstance(value, str)
        case "list":
            return isinstance(value, list)
    entry = expected.removeprefix("list of ").removesuffix("s")
    return isinstance(value, list) and len(value) > 0 and all(_matches(item, entry) for item in value)
