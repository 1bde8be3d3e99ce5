"""The Transformer decoder of Mask2Former (arXiv 2112.01527, section 3.2): queries with masked attention.

Each layer lets the queries attend to one map, but only where their own mask, as predicted so far, is on; then to each
other; then each goes through a feed-forward network. Layers take the maps in turn, coarse to fine.

Notable:
- Cross-attention comes before self-attention, so that queries differ before they see each other.
- A query whose mask is off everywhere attends everywhere: a softmax over nothing would be NaN.
- Masks decide only where queries look; no gradient flows through that decision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.heads.mask2former.pixel_decoder import position_of
from dinov3.layers.embedding import make_embedding
from dinov3.layers.multihead_attention import MultiheadAttention
from dinov3.layers.perceptron import Perceptron
from dinov3.layers.resizing import resize_bilinear

N_LEVELS = 3


class MaskDecoder(nn.Module):
    """Predict the class and the mask of each query.

    Args:
        in_channels: channels of the maps.
        hidden_dim: D.
        num_classes: K, without "no object".
        mask_dim: channels of the mask features.
        n_queries: Q.
        n_heads: of the attentions.
        ffn_dim: hidden width of the feed-forward networks.
        n_layers: number of layers.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_dim: int = 2048,
        num_classes: int = 150,
        mask_dim: int = 2048,
        *,
        n_queries: int = 100,
        n_heads: int = 16,
        ffn_dim: int = 4096,
        n_layers: int = 9,
    ) -> None:
        super().__init__()
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden_dim, n_heads) for _ in range(n_layers)
        )
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(hidden_dim, n_heads) for _ in range(n_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(FFNLayer(hidden_dim, ffn_dim) for _ in range(n_layers))
        self.post_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = make_embedding(n_queries, hidden_dim)
        self.query_embed = make_embedding(n_queries, hidden_dim)
        self.level_embed = make_embedding(N_LEVELS, hidden_dim)
        self.input_proj = nn.ModuleList(
            nn.Identity() if in_channels == hidden_dim else nn.Conv2d(in_channels, hidden_dim, kernel_size=1)
            for _ in range(N_LEVELS)
        )
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = Perceptron(hidden_dim, hidden_dim, mask_dim, 3)

    def forward(self, maps: list[Tensor], mask_features: Tensor, *, only_last: bool = False) -> list[dict[str, Tensor]]:
        """Predict before the first layer, and after each.

        Args:
            maps: three [B, C, h, w], coarse to fine.
            mask_features: [B, mask_dim, H, W].
            only_last: return only the last prediction, and keep no other in memory.

        Returns:
            For each prediction `pred_logits` [B, Q, K + 1], of which the last is "no object", and `pred_masks`, logits
            [B, Q, H, W].
        """
        projected = [project(x) for project, x in zip(self.input_proj, maps, strict=True)]
        grids = [x.shape[-2:] for x in maps]
        positions = [position_of(x).to(x.dtype) for x in projected]  # [1, h w, D]
        memories = [x.flatten(2).mT + row for x, row in zip(projected, self.level_embed.weight, strict=True)]
        queries = self.query_feat.weight.expand(len(mask_features), -1, -1)  # [B, Q, D]
        query_position = self.query_embed.weight
        predictions = [self._predict(queries, mask_features)]
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for i, (cross_attention, self_attention, ffn) in enumerate(layers):
            level = i % N_LEVELS
            seen = _seen_cells(predictions[-1]["pred_masks"], grids[level])
            queries = cross_attention(queries, query_position, memories[level], positions[level], seen)
            queries = self_attention(queries, query_position)
            queries = ffn(queries)
            predictions = [] if only_last else predictions
            predictions.append(self._predict(queries, mask_features))
        return predictions

    def _predict(self, queries: Tensor, mask_features: Tensor) -> dict[str, Tensor]:
        normed = self.post_norm(queries)
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(normed), mask_features)
        return {"pred_logits": self.class_embed(normed), "pred_masks": masks}


def _seen_cells(masks: Tensor, grid: torch.Size) -> Tensor:
    # Where each query may look, as one mask for all heads: bool [B, 1, Q, h w].
    logits = resize_bilinear(masks.detach(), grid).flatten(2)
    seen = logits >= 0  # where the sigmoid is at least 1/2
    return (seen | ~seen.any(dim=-1, keepdim=True))[:, None]


class CrossAttentionLayer(nn.Module):
    """Queries attend to the cells of a map; post-norm."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.multihead_attn = MultiheadAttention(dim, n_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, queries: Tensor, query_position: Tensor, memory: Tensor, memory_position: Tensor, seen: Tensor
    ) -> Tensor:
        """Update queries [B, Q, D] from `memory` [B, N, D], of which each one sees the cells `seen` [B, 1, Q, N]."""
        gathered = self.multihead_attn(queries + query_position, memory + memory_position, memory, seen)
        return self.norm(queries + gathered)


class SelfAttentionLayer(nn.Module):
    """Queries attend to each other; post-norm."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(dim, n_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, query_position: Tensor) -> Tensor:
        """Update queries [B, Q, D]."""
        positioned = queries + query_position
        return self.norm(queries + self.self_attn(positioned, positioned, queries))


class FFNLayer(nn.Module):
    """A feed-forward network with a ReLU; post-norm."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm = nn.LayerNorm(dim)
        if not self.linear1.weight.is_meta:
            nn.init.xavier_uniform_(self.linear1.weight)
            nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, queries: Tensor) -> Tensor:
        """Update queries [B, Q, D]."""
        return self.norm(queries + self.linear2(F.relu(self.linear1(queries))))
