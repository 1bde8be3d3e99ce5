"""Activation checkpointing of a backbone: memory for time, without changing what is computed."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

#: What selective checkpointing keeps: matrix products, fused attention, and FSDP's communication.
KEPT_OPERATIONS = [
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
]


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
