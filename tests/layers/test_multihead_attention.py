"""Attention between two sequences."""

from __future__ import annotations

import torch
from torch import nn

from dinov3.layers.multihead_attention import MultiheadAttention


def test_attention_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, batch_first=True)
    nn.init.normal_(ours.in_proj_bias)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(3, 4, 8), torch.randn(3, 6, 8), torch.randn(3, 6, 8)
    seen = torch.rand(3, 1, 4, 6) < 0.6
    seen[..., 0] = True
    want, _ = theirs(query, key, value, attn_mask=~seen.expand(-1, 2, -1, -1).flatten(0, 1))
    torch.testing.assert_close(ours(query, key, value, seen), want)
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value)[0])
