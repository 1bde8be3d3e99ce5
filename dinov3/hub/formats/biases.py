"""The bias of queries, keys and values: one vector and its mask in our layout, up to three vectors in the others'."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dinov3.hub.architectures import count_blocks
from dinov3.hub.formats.layouts import State


def effective_bias(state: Mapping[str, Tensor], block: str) -> Tensor | None:
    """The bias [3 D] of queries, keys and values after its mask; None if there is none.

    Args:
        state: a ViT in our names.
        block: the block's name, e.g. `blocks.0`.
    """
    bias, mask = state.get(f"{block}.attn.qkv.bias"), state.get(f"{block}.attn.qkv.bias_mask")
    return bias if bias is None or mask is None else bias * mask.to(bias.dtype)


def effective_biases(state: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """`effective_bias` of each block that has one."""
    biases = {block: effective_bias(state, f"blocks.{block}") for block in range(count_blocks(state))}
    return {block: bias for block, bias in biases.items() if bias is not None}


def split_biases(state: Mapping[str, Tensor], name: str, *, keep_zeros: bool = False) -> State:
    """The biases of queries, keys and values of all blocks, each as an entry of its own.

    Args:
        state: a ViT in our names.
        name: of the entries, with {} for the block and for the letter.
        keep_zeros: also give the biases of queries and values where all are zero.
    """
    biases = {block: bias.chunk(3) for block, bias in effective_biases(state).items()}
    has_q, has_k, has_v = (any(bool(parts[i].any()) for parts in biases.values()) for i in range(3))
    is_wanted = {"q": keep_zeros or has_q or has_v, "k": has_k, "v": keep_zeros or has_q or has_v}
    return {
        name.format(block, letter): part
        for block, parts in biases.items()
        for letter, part in zip("qkv", parts, strict=True)
        if is_wanted[letter]
    }


def joined_bias(block: str, q: Tensor | None, k: Tensor | None, v: Tensor | None) -> State:
    """Our two entries of a block, from its biases; none if it has no bias at all."""
    given = [bias for bias in (q, k, v) if bias is not None]
    if not given:
        return {}
    zero, one = torch.zeros_like(given[0]), torch.ones_like(given[0])
    q, k, v = (zero if bias is None else bias for bias in (q, k, v))
    return {
        f"{block}.attn.qkv.bias": torch.cat([q, k, v]),
        f"{block}.attn.qkv.bias_mask": torch.cat([one, one if bool(k.any()) else zero, one]),
    }
