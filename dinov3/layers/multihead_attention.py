"""Attention between two sequences, as the Transformers of query-based models have it (DETR, Mask2Former)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.Module):
    """Multi-head attention with the entries of `nn.MultiheadAttention`, and one mask for all heads.

    The module of torch would copy the mask for each head, and average weights that nobody reads.

    Args:
        dim: D, of queries, keys and values.
        n_heads: number of heads.
    """

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        if not self.in_proj_weight.is_meta:
            nn.init.xavier_uniform_(self.in_proj_weight)
            nn.init.xavier_uniform_(self.out_proj.weight)
            nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
        """Attend from [B, Q, D] to [B, N, D], where `seen` (bool [B, 1, Q, N]) is True. Default: everywhere."""
        projections = zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), (query, key, value), strict=True)
        q, k, v = (self._split_heads(F.linear(x, weight, bias)) for weight, bias, x in projections)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)  # [B, M, Q, D / M]
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Any:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
