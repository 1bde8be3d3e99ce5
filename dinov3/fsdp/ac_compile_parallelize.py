"""Preparing untouched models for a training: activation checkpointing, compilation, sharding.

Notable:
- Names in the state dict stay what they are in the plain model.
- One process that computes in float32 gets plain modules; FSDP2 serves several processes, and mixed precision on any
  number of them, so that numerics do not depend on it.
- Blocks are found by what a backbone has (`blocks`, or `stages` and `downsample_layers`), not by its class.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dinov3 import distributed
from dinov3.distributed import runtime
from dinov3.fsdp.sharding import average_gradients, make_mesh, shard_after_forward, shard_backbone
from dinov3.utils import as_torch_dtype, has_batchnorms

logger = logging.getLogger("dinov3")

BACKBONE = "backbone"
#: Results that selective checkpointing keeps: matrix products, fused attention, and FSDP's communication.
KEPT_OPERATIONS = [
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
]


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
        trained_model_process_group: processes to shard the trained model over. Default: all.
        inference_only_models_process_groups: the same for each frozen model. Default: all for each.

    Raises:
        NotImplementedError: a model has batch norms, whose statistics would differ between ranks.
        ValueError: a setting is unknown or impossible.
    """
    groups = list(inference_only_models_process_groups or [None] * len(inference_only_models))
    models = [trained_model, *inference_only_models]
    if len(groups) != len(inference_only_models):
        raise ValueError(
            f"{len(inference_only_models)} inference-only models, but {len(groups)} process groups for them"
        )
    if any(has_batchnorms(model) for model in models):
        raise NotImplementedError("models with batch norms cannot be trained: their statistics differ between ranks")
    strategy = cfg.compute_precision.sharding_strategy
    if strategy != "SHARD_GRAD_OP":
        raise ValueError(f"unknown compute_precision.sharding_strategy={strategy!r}; use SHARD_GRAD_OP")
    device = runtime.device()

    if cfg.train.checkpointing:
        checkpoint_activations(_blocks(trained_model[BACKBONE]), full=cfg.train.checkpointing_full)
    if wants_compilation(cfg.train.compile, device):
        options: dict[str, Any] = {}
        if cfg.train.cudagraphs:
            options = {"fullgraph": True, "dynamic": False, "options": {"triton.cudagraphs": True}}
        for module in chain.from_iterable((*_parts_in_order(model[BACKBONE]), *_heads(model)) for model in models):
            module.compile(**options)
    policy = MixedPrecisionPolicy(
        param_dtype=as_torch_dtype(cfg.compute_precision.param_dtype),
        reduce_dtype=as_torch_dtype(cfg.compute_precision.reduce_dtype),
    )
    if _wants_fsdp(cfg.train.fsdp, is_mixed=policy.param_dtype != torch.float32):
        if not distributed.is_enabled():
            distributed.enable()
        for model, group in zip(models, [trained_model_process_group, *groups], strict=True):
            mesh = make_mesh(group, device)
            shard_backbone(model[BACKBONE], _parts_in_order(model[BACKBONE]), mesh, policy)
            for head in _heads(model):
                fully_shard(head, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            if model is trained_model:
                average_gradients(model, mesh, policy)
            else:
                shard_after_forward(model)
    for model in models:
        if any(entry.is_meta for entry in chain(model.parameters(), model.buffers())):
            model.to_empty(device=device)
        else:
            model.to(device)


def checkpoint_activations(modules: Iterable[nn.Module], *, full: bool) -> None:
    """Make each module recompute its activations in the backward pass; names in the state dict stay.

    Args:
        modules: e.g. the blocks of a transformer.
        full: recompute everything; otherwise keep the results of `KEPT_OPERATIONS`.
    """
    options = {} if full else {"context_fn": functools.partial(create_selective_checkpoint_contexts, KEPT_OPERATIONS)}
    for module in modules:
        # Not a wrapper module: names stay as they are, and FSDP's hooks stay out of the recomputation.
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False, **options)


def wants_compilation(setting: bool | Literal["auto"], device: torch.device) -> bool:
    """Return whether to compile: `setting`, with `"auto"` on CUDA only, and never where compiling fails (it warns).

    Args:
        setting: `train.compile`.
        device: where the model runs.

    Raises:
        ValueError: an unknown setting.
    """
    if setting not in (True, False, "auto"):
        raise ValueError(f"unknown train.compile={setting!r}; use auto, true or false")
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return False
    problem = _compilation_problem(device)
    if problem is not None:
        logger.warning("train.compile=%s, but compiling fails here, so the model is not compiled: %s", setting, problem)
    return problem is None


@functools.cache
def _compilation_problem(device: torch.device) -> str | None:
    # Tried on two operations, because a missing compiler would otherwise only show in the first step.
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _wants_fsdp(setting: str, *, is_mixed: bool) -> bool:
    world_size = distributed.get_world_size()
    if setting == "always":
        return True
    if setting == "auto":
        return world_size > 1 or is_mixed
    if setting != "never":
        raise ValueError(f"unknown train.fsdp={setting!r}; use auto, always or never")
    if world_size > 1:
        raise ValueError(f"train.fsdp=never leaves {world_size} processes without a common gradient; use auto")
    if is_mixed:
        raise ValueError(
            "train.fsdp=never computes in float32; set compute_precision.param_dtype=fp32, or train.fsdp=auto"
        )
    return False


def _heads(model: nn.ModuleDict) -> list[nn.Module]:
    return [module for name, module in model.items() if name != BACKBONE]


def _parts_in_order(backbone: nn.Module) -> list[nn.Module]:
    """Return blocks of a ViT, or downsampling layers and stages of a ConvNeXt, in the order of the forward pass."""
    if hasattr(backbone, "blocks"):
        return list(backbone.blocks)  # type: ignore[arg-type]
    if hasattr(backbone, "stages") and hasattr(backbone, "downsample_layers"):
        pairs = zip(backbone.downsample_layers, backbone.stages, strict=True)  # type: ignore[arg-type]
        return list(chain.from_iterable(pairs))
    raise ValueError(f"{type(backbone).__name__} has neither blocks nor stages and downsample_layers")


def _blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return blocks of a ViT, or downsampling layers and single blocks of a ConvNeXt."""
    parts = _parts_in_order(backbone)
    if hasattr(backbone, "blocks"):
        return parts
    return [*parts[::2], *chain.from_iterable(parts[1::2])]  # type: ignore[arg-type]
