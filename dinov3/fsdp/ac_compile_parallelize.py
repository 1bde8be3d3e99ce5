"""Everything that prepares untouched models for a training: activation checkpointing, compilation, sharding.

Notable:
- Names in the state dict stay what they are in the plain model.
- One process that computes in float32 gets plain modules; FSDP2 serves several processes, and mixed precision on any
  number of them, so that numerics do not depend on it.
- Blocks are found by what a backbone has (`blocks`, or `stages` and `downsample_layers`), not by its class.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import MixedPrecisionPolicy

from dinov3 import distributed
from dinov3.distributed import runtime
from dinov3.fsdp.activation_checkpointing import checkpoint_activations
from dinov3.fsdp.compiling import compile_in_place, wants_compilation
from dinov3.fsdp.sharding import make_mesh, shard_backbone, shard_head
from dinov3.utils import as_torch_dtype, has_batchnorms

logger = logging.getLogger("dinov3")

BACKBONE = "backbone"


def ac_compile_parallelize(
    trained_model: nn.ModuleDict,
    inference_only_models: Sequence[nn.ModuleDict],
    cfg: Any,
    trained_model_process_group: ProcessGroup | None = None,
    inference_only_models_process_groups: Sequence[ProcessGroup | None] | None = None,
) -> None:
    """Checkpoint activations, compile and shard, in place, and give meta tensors memory on the device.

    Args:
        trained_model: `backbone` and heads, on the meta device (memory is then uninitialised) or elsewhere (values are
            kept).
        inference_only_models: the same for frozen models; they hold no whole parameters between two calls.
        cfg: `train.{checkpointing, checkpointing_full, compile, cudagraphs, fsdp}` and
            `compute_precision.{param_dtype, reduce_dtype, sharding_strategy}`.
        trained_model_process_group: processes to shard the trained model over; None: all.
        inference_only_models_process_groups: the same for each frozen model; None: all for each.

    Raises:
        NotImplementedError: a model has batch norms, whose statistics would differ between ranks.
        ValueError: a setting that is unknown or impossible.
    """
    groups = list(inference_only_models_process_groups or [None] * len(inference_only_models))
    models = [trained_model, *inference_only_models]
    _check(models, groups, cfg)
    device = runtime.device()

    if cfg.train.checkpointing:
        checkpoint_activations(_blocks(trained_model[BACKBONE]), full=cfg.train.checkpointing_full)
    if wants_compilation(cfg.train.compile, device):
        for model in models:
            compile_in_place(chain(_parts_in_order(model[BACKBONE]), _heads(model)), cudagraphs=cfg.train.cudagraphs)
    if _wants_fsdp(cfg):
        if not distributed.is_enabled():
            distributed.enable()
        for model, group in zip(models, [trained_model_process_group, *groups], strict=True):
            _shard(model, group, device, cfg)
    for model in models:
        _move(model, device)


def _check(models: list[nn.ModuleDict], groups: list[ProcessGroup | None], cfg: Any) -> None:
    if len(groups) != len(models) - 1:
        raise ValueError(f"{len(models) - 1} inference-only models, but {len(groups)} process groups for them")
    if any(has_batchnorms(model) for model in models):
        raise NotImplementedError("models with batch norms cannot be trained: their statistics differ between ranks")
    strategy = cfg.compute_precision.sharding_strategy
    if strategy != "SHARD_GRAD_OP":
        raise ValueError(f"compute_precision.sharding_strategy={strategy!r} is unknown; use SHARD_GRAD_OP")


def _wants_fsdp(cfg: Any) -> bool:
    setting = cfg.train.fsdp
    world_size = distributed.get_world_size()
    is_mixed = _policy(cfg).param_dtype != torch.float32
    if setting == "always":
        return True
    if setting == "auto":
        return world_size > 1 or is_mixed
    if setting != "never":
        raise ValueError(f"train.fsdp={setting!r} is unknown; use auto, always or never")
    if world_size > 1:
        raise ValueError(f"train.fsdp=never leaves {world_size} processes without a common gradient; use auto")
    if is_mixed:
        raise ValueError(
            "train.fsdp=never computes in float32; set compute_precision.param_dtype=fp32, or train.fsdp=auto"
        )
    return False


def _policy(cfg: Any) -> MixedPrecisionPolicy:
    precision = cfg.compute_precision
    return MixedPrecisionPolicy(
        param_dtype=as_torch_dtype(precision.param_dtype), reduce_dtype=as_torch_dtype(precision.reduce_dtype)
    )


def _shard(model: nn.ModuleDict, group: ProcessGroup | None, device: torch.device, cfg: Any) -> None:
    mesh, policy = make_mesh(group, device), _policy(cfg)
    shard_backbone(model[BACKBONE], _parts_in_order(model[BACKBONE]), mesh, policy)
    for head in _heads(model):
        shard_head(head, mesh, policy)


def _move(model: nn.Module, device: torch.device) -> None:
    if any(entry.is_meta for entry in chain(model.parameters(), model.buffers())):
        model.to_empty(device=device)
    else:
        model.to(device)


def _heads(model: nn.ModuleDict) -> list[nn.Module]:
    return [module for name, module in model.items() if name != BACKBONE]


def _is_vit(backbone: nn.Module) -> bool:
    return hasattr(backbone, "blocks")


def _parts_in_order(backbone: nn.Module) -> list[nn.Module]:
    """Blocks of a ViT; downsampling layers and stages of a ConvNeXt; in the order of the forward pass."""
    if _is_vit(backbone):
        return list(backbone.blocks)  # type: ignore[arg-type]
    if hasattr(backbone, "stages") and hasattr(backbone, "downsample_layers"):
        pairs = zip(backbone.downsample_layers, backbone.stages, strict=True)  # type: ignore[arg-type]
        return list(chain.from_iterable(pairs))
    raise ValueError(f"{type(backbone).__name__} has neither blocks nor stages and downsample_layers")


def _blocks(backbone: nn.Module) -> list[nn.Module]:
    """Blocks of a ViT; downsampling layers and single blocks of a ConvNeXt."""
    parts = _parts_in_order(backbone)
    if _is_vit(backbone):
        return parts
    return [*parts[::2], *chain.from_iterable(parts[1::2])]  # type: ignore[arg-type]
