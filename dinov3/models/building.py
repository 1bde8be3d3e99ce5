"""Backbones from the `student` section of a training configuration."""

from __future__ import annotations

import functools
from inspect import signature
from typing import Any

import torch
from torch import nn

from dinov3.distributed import runtime
from dinov3.layers import convert_linears_to_fp8
from dinov3.layers.fp8_linear import fp8_problem
from dinov3.models import vision_transformer
from dinov3.models.convnext import ConvNeXt, get_convnext_arch
from dinov3.models.vision_transformer import DinoVisionTransformer
from dinov3.utils import default_device


def build_model(
    args: Any,
    only_teacher: bool = False,
    img_size: int = 224,
    device: torch.device | str | None = None,
    *,
    fp8: bool = True,
) -> tuple[Any, ...]:
    """Build student and teacher backbones, without initialising them.

    The teacher is the student without stochastic depth. If `ffn_ratio` or `depth` is null, the architecture decides;
    options that are missing in `args` have the defaults of the model's constructor.

    Args:
        args: the `student` section.
        only_teacher: do not build a student.
        img_size: side of the global crops, informative.
        device: of the parameters.
        fp8: compute in 8 bits if `args` says so. The weights are the same without it, and run anywhere.

    Returns:
        (student, teacher, D), or (teacher, D) with `only_teacher`.

    Raises:
        NotImplementedError: `arch` is neither a ViT nor a ConvNeXt that we know.
        ValueError: 8-bit products are requested (`fp8_enabled`), but not possible; see `init_fp8`.
    """
    if fp8:
        _check_fp8_device(args, device)
    architectures = [name for name in vars(vision_transformer) if name.startswith("vit_")]
    if "convnext" in args.arch:
        teacher = _convnext(args, device)
        student = None if only_teacher else _convnext(args, device)
    elif args.arch in architectures:
        options = {name: args[name] for name in signature(DinoVisionTransformer).parameters if name in args}
        drop_path_rate = options.pop("drop_path_rate", 0.0)
        for name in ("ffn_ratio", "depth"):
            if options.get(name) is None:
                options.pop(name, None)
        if "layerscale" in args:
            options["layerscale_init"] = args.layerscale
        make = functools.partial(getattr(vision_transformer, args.arch), **options, img_size=img_size, device=device)
        teacher = make()
        student = None if only_teacher else make(drop_path_rate=drop_path_rate)
        if fp8:
            init_fp8(teacher, args)
    else:
        raise NotImplementedError(
            f"there is no architecture {args.arch!r}, only {', '.join(architectures)} and convnext_<size>"
        )
    if fp8 and student is not None:
        init_fp8(student, args)
    return (teacher, teacher.embed_dim) if only_teacher else (student, teacher, teacher.embed_dim)


def build_model_from_cfg(cfg: Any, only_teacher: bool = False, *, fp8: bool = True) -> tuple[Any, ...]:
    """Call `build_model` on the meta device for a whole training configuration.

    Args:
        cfg: with the sections `student` and `crops`.
        only_teacher: do not build a student.
        fp8: as in `build_model`.

    Returns:
        As `build_model`.
    """
    sizes = cfg.crops.global_crops_size
    img_size = sizes if isinstance(sizes, int) else max(sizes)
    return build_model(cfg.student, only_teacher=only_teacher, img_size=img_size, device="meta", fp8=fp8)


def init_fp8(model: nn.Module, args: Any) -> nn.Module:
    """Make linear layers compute in 8 bits, in place, if the configuration says so.

    Args:
        model: a backbone; one on the meta device is meant for the device of this process.
        args: the `student` section: `fp8_enabled`, and `fp8_filter`, see `convert_linears_to_fp8`.

    Returns:
        `model`.

    Raises:
        ValueError: the device has no 8-bit products, or the layers that the filter selects cannot use them.
    """
    if not args.get("fp8_enabled", False):
        return model
    _check_fp8_device(args, next(model.parameters()).device)
    pattern = args.get("fp8_filter", "blocks")
    try:
        return convert_linears_to_fp8(model, filter=pattern)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"student.fp8_enabled=true with student.fp8_filter={pattern}: {error}") from error


def _check_fp8_device(args: Any, device: torch.device | str | None) -> None:
    if not args.get("fp8_enabled", False):
        return
    wanted = default_device() if device is None else torch.device(device)
    problem = fp8_problem(runtime.device() if wanted.type == "meta" else wanted)
    if problem is not None:
        raise ValueError(
            f"student.fp8_enabled=true: {problem}; set student.fp8_enabled=false (for a teacher, in its configuration)"
        )


def _convnext(args: Any, device: torch.device | str | None) -> ConvNeXt:
    with torch.device(device or default_device()):
        return get_convnext_arch(args.arch)(patch_size=args.patch_size)
