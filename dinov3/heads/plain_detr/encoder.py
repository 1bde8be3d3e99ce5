"""The encoder of a detector (DETR, arXiv 2005.12872, appendix A.3): post-norm layers of attention between all cells."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.layers.multihead_attention import MultiheadAttention


class EncoderLayer(nn.Module):
    """Attention between cells, and a feed-forward network.

    Args:
        dim: E.
        n_heads: of the attention.
        ffn_dim: hidden width of the feed-forward network.
        dropout: of both, in training.
    """

    def __init__(self, dim: int, n_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(dim, n_heads)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, pos: Tensor, seen: Tensor | None) -> Tensor:
        """Update cells [B, N, E] with positions [B, N, E]; `seen` is bool [B, 1, 1, N]."""
        q = x + pos
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x, seen)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class Encoder(nn.Module):
    """A stack of layers.

    Args:
        n_layers: number of layers.
        dim: E.
        n_heads: of the attentions.
        ffn_dim: see `EncoderLayer`.
        dropout: see `EncoderLayer`.
    """

    def __init__(self, n_layers: int, dim: int, n_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, n_heads, ffn_dim, dropout) for _ in range(n_layers))

    def forward(self, src: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        """Encode cells.

        Args:
            src: [B, N, E].
            mask: bool [B, N], True in the padding, which nothing attends to.
            pos: [B, N, E].

        Returns:
            The memory [B, N, E].
        """
        for layer in self.layers:
            src = layer(src, pos, ~mask[:, None, None])
        return src
