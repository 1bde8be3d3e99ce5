"""Backbones from the `student` section of a training configuration."""

from __future__ import annotations

from typing import Any

import torch

from dinov3.models import vision_transformer
from dinov3.models.convnext import ConvNeXt, get_convnext_arch

#: Arguments of a ViT that bear another name in the configuration, or that only some configurations have.
_RENAMED = {"layerscale_init": "layerscale"}
_OPTIONAL = ("ffn_ratio", "depth")
_VIT_OPTIONS = (
    "patch_size",
    "in_chans",
    "pos_embed_rope_base",
    "pos_embed_rope_min_period",
    "pos_embed_rope_max_period",
    "pos_embed_rope_normalize_coords",
    "pos_embed_rope_shift_coords",
    "pos_embed_rope_jitter_coords",
    "pos_embed_rope_rescale_coords",
    "pos_embed_rope_dtype",
    "qkv_bias",
    "layerscale_init",
    "norm_layer",
    "ffn_layer",
    "ffn_bias",
    "proj_bias",
    "n_storage_tokens",
    "mask_k_bias",
    "untie_cls_and_patch_norms",
    "untie_global_and_local_cls_norm",
)


def build_model(
    args: Any, only_teacher: bool = False, img_size: int = 224, device: torch.device | str | None = None
) -> tuple[Any, ...]:
    """Student and teacher backbones, not initialised.

    The teacher is the student without stochastic depth. `ffn_ratio` and `depth` of null mean the architecture's own;
    options that `args` does not have are those of the model's constructor.

    Args:
        args: the `student` section.
        only_teacher: build no student.
        img_size: side of the global crops, informative.
        device: of the parameters.

    Returns:
        (student, teacher, D), or (teacher, D) with `only_teacher`.

    Raises:
        NotImplementedError: `arch` is neither a ViT nor a ConvNeXt that we know, or 8-bit products are asked for.
    """
    if args.get("fp8_enabled", False):
        raise NotImplementedError("student.fp8_enabled=true: 8-bit matrix products are not available yet")
    if "convnext" in args.arch:
        teacher = _convnext(args, device)
        student = None if only_teacher else _convnext(args, device)
    elif hasattr(vision_transformer, args.arch) and args.arch.startswith("vit_"):
        options = _vit_options(args) | {"img_size": img_size, "device": device}
        factory = getattr(vision_transformer, args.arch)
        teacher = factory(**options)
        student = None if only_teacher else factory(**options, drop_path_rate=args.get("drop_path_rate", 0.0))
    else:
        known = ", ".join(name for name in vars(vision_transformer) if name.startswith("vit_"))
        raise NotImplementedError(f"there is no architecture {args.arch!r}, only {known} and convnext_<size>")
    return (teacher, teacher.embed_dim) if only_teacher else (student, teacher, teacher.embed_dim)


def build_model_from_cfg(cfg: Any, only_teacher: bool = False) -> tuple[Any, ...]:
    """`build_model` on the meta device for a whole training configuration.

    Args:
        cfg: with the sections `student` and `crops`.
        only_teacher: build no student.

    Returns:
        As `build_model`.
    """
    sizes = cfg.crops.global_crops_size
    img_size = sizes if isinstance(sizes, int) else max(sizes)
    return build_model(cfg.student, only_teacher=only_teacher, img_size=img_size, device="meta")


def _vit_options(args: Any) -> dict[str, Any]:
    options = {name: args[_RENAMED.get(name, name)] for name in _VIT_OPTIONS if _RENAMED.get(name, name) in args}
    return options | {name: args[name] for name in _OPTIONAL if args.get(name) is not None}


def _convnext(args: Any, device: torch.device | str | None) -> ConvNeXt:
    with torch.device(device or torch.get_default_device()):
        return get_convnext_arch(args.arch)(patch_size=args.patch_size)
