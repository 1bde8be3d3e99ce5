"""Attention within each of many sequences of different lengths in one call, on CUDA, with xformers.

The crops of a training batch are sequences of a few lengths. By default `SelfAttention` calls PyTorch's fused attention
once for each length; with this backend all of them are one long sequence whose mask is block-diagonal.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

BACKENDS = ("sdpa", "xformers")


def set_attention_backend(model: nn.Module, backend: str, device: torch.device) -> None:
    """Choose how every `SelfAttention` of a model attends to several token tensors at once.

    Args:
        model: changed in place, except for its parameters.
        backend: `sdpa`, one call of `torch.nn.functional.scaled_dot_product_attention` per tensor, or `xformers`.
        device: where the model will run.

    Raises:
        ImportError: xformers is not installed.
        ValueError: an unknown backend, or xformers on another device than CUDA.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; use {' or '.join(BACKENDS)}")
    if backend == "xformers":
        if device.type != "cuda":
            raise ValueError(f"attention by xformers runs on CUDA only, not on {device.type}: use sdpa")
        if importlib.util.find_spec("xformers") is None:
            raise ImportError("attention by xformers needs that package: pip install xformers")
    for module in model.modules():
        if hasattr(module, "attention_backend"):
            module.attention_backend = backend  # type: ignore[assignment]


def attend_packed(heads: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Attend within each sequence, by xformers.

    Args:
        heads: queries, keys and values, each [B_i, heads, T_i, d].

    Returns:
        [sum of B_i * T_i, heads * d].
    """
    ops: Any = importlib.import_module("xformers.ops")
    lengths = [q.shape[2] for q, _, _ in heads for _ in range(len(q))]
    mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=heads[0][0].device)
    q, k, v = (
        torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])[None]  # [1, sum of B_i * T_i, heads, d]
        for parts in zip(*heads, strict=True)
    )
    return ops.memory_efficient_attention(q, k, v, attn_bias=mask)[0].flatten(1)
