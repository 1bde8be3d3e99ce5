"""The pixel decoder of Mask2Former (arXiv 2112.01527, section 3.2.1): deformable attention over three maps.

Tokens of strides 32, 16 and 8 attend to each other (Deformable DETR's encoder, arXiv 2010.04159, section 4.1); the
finest of them is then upsampled and added to the map of stride 4, of which the mask features are made.

Notable: it runs in the precision of its weights, whatever the caller's autocast says, as the published head did.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.heads.mask2former.adapter import split_levels
from dinov3.heads.precision import autocast_to
from dinov3.layers.deformable_attention import MSDeformAttn, Shapes, cell_centres
from dinov3.layers.position_encodings import grid_sine_encoding
from dinov3.layers.resizing import resize_bilinear

#: Levels of the encoder, coarse to fine, and the one that is only added at the end.
ENCODED_LEVELS = ("4", "3", "2")
FINEST_LEVEL = "1"
N_GROUPS = 32


class PixelDecoder(nn.Module):
    """Turn a pyramid into mask features of stride 4 and three maps of context.

    Args:
        in_channels: C of each level `"1"` to `"4"`, fine to coarse.
        hidden_dim: D.
        mask_dim: channels of the mask features.
        n_heads: of the attentions.
        n_points: of the attentions, for each head and level.
        ffn_dim: hidden width of the feed-forward networks.
        n_layers: of the encoder.
    """

    def __init__(
        self,
        in_channels: dict[str, int],
        hidden_dim: int = 2048,
        mask_dim: int = 2048,
        *,
        n_heads: int = 16,
        n_points: int = 4,
        ffn_dim: int = 4096,
        n_layers: int = 6,
    ) -> None:
        super().__init__()
        self.input_convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(in_channels[level], hidden_dim, kernel_size=1), nn.GroupNorm(N_GROUPS, hidden_dim))
            for level in ENCODED_LEVELS
        )
        self.encoder = DeformableEncoder(hidden_dim, n_heads, n_points, ffn_dim, n_layers)
        self.lateral_convs = nn.ModuleList([_NormedConv(in_channels[FINEST_LEVEL], hidden_dim, 1)])
        self.output_convs = nn.ModuleList([_NormedConv(hidden_dim, hidden_dim, 3)])
        self.mask_feature: Any = nn.Conv2d(hidden_dim, mask_dim, kernel_size=1)
        if not self.mask_feature.weight.is_meta:
            self._init_weights()

    def _init_weights(self) -> None:
        for sequential in self.input_convs:
            projection: Any = sequential[0]  # type: ignore[index]
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        for convolution in (*self.lateral_convs, *self.output_convs, self.mask_feature):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(self.mask_feature.bias)

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode a pyramid.

        Args:
            features: maps [B, C, H/4, W/4], [B, C, H/8, W/8], [B, C, H/16, W/16], [B, C, H/32, W/32] of the levels
                `"1"` to `"4"`.

        Returns:
            Mask features [B, mask_dim, H/4, W/4], and the maps [B, D, ...] of strides 32, 16 and 8.
        """
        dtype = self.mask_feature.weight.dtype
        features = {level: maps.to(dtype) for level, maps in features.items()}
        with autocast_to(features[FINEST_LEVEL].device.type, torch.float32):
            projected = [conv(features[level]) for level, conv in zip(ENCODED_LEVELS, self.input_convs, strict=True)]
            maps = self.encoder(projected)
            lateral = self.lateral_convs[0](features[FINEST_LEVEL])
            finest = F.relu(self.output_convs[0](lateral + resize_bilinear(maps[-1], lateral.shape[-2:])))
            return self.mask_feature(finest), maps


class DeformableEncoder(nn.Module):
    """Let the cells of three maps attend to each other.

    Args:
        dim: D.
        n_heads: of the attentions.
        n_points: of the attentions, for each head and level.
        ffn_dim: hidden width of the feed-forward networks.
        n_layers: number of layers.
    """

    def __init__(self, dim: int, n_heads: int, n_points: int, ffn_dim: int, n_layers: int) -> None:
        super().__init__()
        n_levels = len(ENCODED_LEVELS)
        self.level_encoding = nn.Parameter(torch.zeros(n_levels, dim))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            DeformableEncoderLayer(dim, n_levels, n_heads, n_points, ffn_dim) for _ in range(n_layers)
        )
        if not self.level_encoding.is_meta:
            nn.init.normal_(self.level_encoding)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Map [B, D, h, w] of each level to the same shapes."""
        grids = [(x.shape[-2], x.shape[-1]) for x in maps]
        tokens = torch.cat([x.flatten(2).mT for x in maps], dim=1)  # [B, N, D]
        position = torch.cat(
            [position_of(x).to(x.dtype) + row for x, row in zip(maps, self.level_encoding, strict=True)], dim=1
        )
        # On every level the points lie around the centre of the query's own cell.
        centres = cell_centres(grids, device=tokens.device)
        layers: Any = self.encoder.layers
        for layer in layers:
            tokens = layer(tokens, position, centres, grids)
        return split_levels(tokens, grids)


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each followed by the norm of its residual sum."""

    def __init__(self, dim: int, n_levels: int, n_heads: int, n_points: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(dim, n_levels, n_heads, n_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        if not self.linear1.weight.is_meta:
            nn.init.xavier_uniform_(self.linear1.weight)
            nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, tokens: Tensor, position: Tensor, centres: Tensor, grids: Shapes) -> Tensor:
        """Map tokens [B, N, D] at `position` [1, N, D] to [B, N, D]."""
        tokens = self.norm1(tokens + self.self_attn(tokens + position, centres, tokens, grids))
        return self.norm2(tokens + self.linear2(F.relu(self.linear1(tokens))))


def position_of(maps: Tensor) -> Tensor:
    """Return the sine encoding of the cells of maps [B, D, h, w] as tokens: float32 [1, h w, D]."""
    valid = torch.ones(1, *maps.shape[-2:], dtype=torch.bool, device=maps.device)
    return grid_sine_encoding(valid, maps.shape[1] // 2).flatten(2).mT


class _NormedConv(nn.Conv2d):
    # Its norm is a child of the convolution, because the published names say so.
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.GroupNorm(N_GROUPS, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))
