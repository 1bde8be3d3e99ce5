"""The decoder of Plain-DETR (arXiv 2308.01904): queries that look at the whole map, each with its box in mind.

The attention of a query to a cell gets a bias that two small networks make of the distances between the sides of the
query's box and the cell: one of the columns, one of the rows. Boxes are refined from layer to layer.

Notable:
- The bias of all queries, heads and cells would take 800 MB at 2048 pixels. It is made and used for some queries at a
  time, straight in the layout of the attention; the result is equal.
- Padded cells are excluded by a mask. (The released code adds -100, which a large bias could outweigh.)
- Boxes, and what their networks compute, are float32, whatever autocast says: a step of bfloat16 at half the size of a
  400-pixel box is 0.8 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov3.heads.precision import autocast_to
from dinov3.layers.boxes import box_cxcywh_to_xyxy
from dinov3.layers.multihead_attention import MultiheadAttention

#: Numbers of the bias that exist at a time: 8 MB in float32.
BIAS_CHUNK = 2**21


def in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a module in float32, whatever autocast and the dtype of its weights are."""
    with autocast_to(x.device.type, torch.float32):
        if all(parameter.dtype == torch.float32 for parameter in module.parameters()):
            return module(x.float())
        weights = {name: parameter.float() for name, parameter in module.named_parameters()}
        return torch.func.functional_call(module, weights, (x.float(),))


class BoxRelativeAttention(nn.Module):
    """Attention of queries to all cells of a map, biased by where cells lie relative to the query's box.

    Args:
        dim: E.
        n_heads: number of heads.
        rpe_hidden_dim: hidden width of the networks that make the bias.
        rpe_type: "linear": they see pixels; "abs_log8": logarithms of pixels.
        stride: pixels of a cell.
    """

    def __init__(self, dim: int, n_heads: int, rpe_hidden_dim: int, rpe_type: str, stride: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.rpe_type = rpe_type
        self.stride = stride
        self.cpb_mlp1, self.cpb_mlp2 = (
            nn.Sequential(nn.Linear(2, rpe_hidden_dim), nn.ReLU(), nn.Linear(rpe_hidden_dim, n_heads, bias=False))
            for _ in range(2)
        )
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, corners: Tensor, mask: Tensor) -> Tensor:
        """Attend from queries to cells.

        Args:
            query: [B, Q, E].
            key: [B, N, E], of a grid of N = h * w cells.
            value: [B, N, E].
            corners: [B, Q, 4], boxes (x1, y1, x2, y2) in pixels.
            mask: bool [B, h, w], True in the padding.

        Returns:
            [B, Q, E].
        """
        projections = ((self.q, query), (self.k, key), (self.v, value))
        q, k, v = (layer(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for layer, x in projections)
        chunk = max(1, BIAS_CHUNK // (len(query) * self.n_heads * key.shape[1]))
        out = torch.cat(
            [
                F.scaled_dot_product_attention(q_part, k, v, attn_mask=self.bias(part, mask).to(q.dtype))
                for q_part, part in zip(q.split(chunk, dim=2), corners.split(chunk, dim=1), strict=True)
            ],
            dim=2,
        )  # [B, heads, Q, E / heads]
        return self.proj(out.transpose(1, 2).flatten(2))

    def bias(self, corners: Tensor, mask: Tensor) -> Tensor:
        """Make the bias of boxes [B, Q, 4], float32 [B, heads, Q, h * w]; minus infinity in the padding."""
        x1, y1, x2, y2 = corners.float().unbind(-1)
        height, width = mask.shape[-2:]
        columns = self._axis(self.cpb_mlp1, x1, x2, width)  # [B, heads, Q, w]
        rows = self._axis(self.cpb_mlp2, y1, y2, height)  # [B, heads, Q, h]
        bias = columns[..., None, :] + rows[..., None]  # [B, heads, Q, h, w]
        hidden = mask[:, None, None]
        bias = bias.masked_fill(hidden, -math.inf) if bias.requires_grad else bias.masked_fill_(hidden, -math.inf)
        return bias.flatten(3)

    def _axis(self, network: nn.Module, first: Tensor, last: Tensor, n_cells: int) -> Tensor:
        centres = (torch.arange(n_cells, device=first.device, dtype=torch.float32) + 0.5) * self.stride
        distances = torch.stack([first[..., None] - centres, last[..., None] - centres], dim=-1)  # [B, Q, n, 2]
        if self.rpe_type == "abs_log8":
            distances = distances.sign() * (distances.abs() + 1).log2() / math.log2(8)
        return in_float32(network, distances).permute(0, 3, 1, 2)


class DecoderLayer(nn.Module):
    """Attention between queries, attention to the map, and a feed-forward network.

    Args:
        dim: E.
        n_heads: of both attentions.
        ffn_dim: hidden width of the feed-forward network.
        dropout: of all three, in training.
        pre_norm: normalise before them, otherwise after.
        attention: more arguments of `BoxRelativeAttention`.
    """

    def __init__(
        self, dim: int, n_heads: int, ffn_dim: int, dropout: float, *, pre_norm: bool, attention: dict[str, Any]
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.cross_attn = BoxRelativeAttention(dim, n_heads, **attention)
        self.self_attn = MultiheadAttention(dim, n_heads)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        key: Tensor,
        value: Tensor,
        corners: Tensor,
        mask: Tensor,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Update queries.

        Args:
            queries: [B, Q, E].
            query_pos: [B, Q, E].
            key: [B, N, E], cells with their positions.
            value: [B, N, E], cells.
            corners: [B, Q, 4], boxes (x1, y1, x2, y2) in pixels.
            mask: bool [B, h, w], True in the padding.
            seen: bool [Q, Q], which queries attend to which. Default: all to all.
        """

        def attend_to_queries(x: Tensor) -> Tensor:
            return self.self_attn(x + query_pos, x + query_pos, x, None if seen is None else seen[None, None])

        def attend_to_map(x: Tensor) -> Tensor:
            return self.cross_attn(x + query_pos, key, value, corners, mask)

        def feed_forward(x: Tensor) -> Tensor:
            return self.linear2(self.dropout(F.relu(self.linear1(x))))

        queries = self._add(queries, attend_to_queries, self.norm2)
        queries = self._add(queries, attend_to_map, self.norm1)
        return self._add(queries, feed_forward, self.norm3)

    def _add(self, queries: Tensor, sublayer: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        if self.pre_norm:
            return queries + self.dropout(sublayer(norm(queries)))
        return norm(queries + self.dropout(sublayer(queries)))


class Decoder(nn.Module):
    """Layers that refine queries and their boxes.

    Args:
        layers: the layers.
        dim: E.
        final_norm: normalise what each layer returns.
        look_forward_twice: let gradients of the returned boxes reach the layer that made them.
        use_checkpoint: compute layers again in the backward pass.
    """

    #: Heads that the detector owns, too: the same modules under two names, as in published files.
    class_embed: nn.ModuleList
    bbox_embed: nn.ModuleList

    def __init__(
        self,
        layers: list[DecoderLayer],
        dim: int,
        *,
        final_norm: bool,
        look_forward_twice: bool,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.final_layer_norm = nn.LayerNorm(dim) if final_norm else None
        self.look_forward_twice = look_forward_twice
        self.use_checkpoint = use_checkpoint

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        boxes: Tensor,
        memory: Tensor,
        pos: Tensor,
        mask: Tensor,
        *,
        refine: Callable[[Tensor, Tensor], Tensor],
        scale: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refine queries and boxes.

        Args:
            queries: [B, Q, E].
            query_pos: [B, Q, E].
            boxes: [B, Q, 4], (cx, cy, w, h), where the queries start.
            memory: [B, N, E].
            pos: [B, N, E], of the cells.
            mask: bool [B, h, w], True in the padding.
            refine: makes boxes from boxes and deltas.
            scale: [B, 1, 4], factor that makes pixels of boxes. Default: they are pixels.
            seen: see `DecoderLayer.forward`.

        Returns:
            Queries [L, B, Q, E], boxes [L, B, Q, 4] and deltas [L, B, Q, 4] after each layer.
        """
        key = memory + pos
        all_queries, all_boxes, all_deltas = [], [], []
        for layer, head in zip(self.layers, self.bbox_embed, strict=False):  # The last head is that of proposals.
            corners = box_cxcywh_to_xyxy(boxes if scale is None else boxes * scale)
            arguments = (queries, query_pos, key, memory, corners, mask, seen)
            if self.use_checkpoint and self.training:
                queries = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                queries = layer(*arguments)
            out = queries if self.final_layer_norm is None else self.final_layer_norm(queries)
            deltas = in_float32(head, out)
            new_boxes = refine(boxes, deltas)
            boxes = new_boxes.detach()
            all_queries.append(out)
            all_boxes.append(new_boxes if self.look_forward_twice else boxes)
            all_deltas.append(deltas)
        return torch.stack(all_queries), torch.stack(all_boxes), torch.stack(all_deltas)
