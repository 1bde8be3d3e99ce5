"""The decoder of a detector: the box-relative bias, in chunks and in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dinov3.heads.plain_detr import decoder
from dinov3.heads.plain_detr.decoder import BoxRelativeAttention, in_float32
from dinov3.layers.perceptron import Perceptron

GRID = (5, 7)


def attention(rpe_type: str = "linear") -> BoxRelativeAttention:
    torch.manual_seed(0)
    return BoxRelativeAttention(16, 4, 8, rpe_type, 16).requires_grad_(False)


def boxes() -> Tensor:
    corners = torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(1)) * 80
    return torch.cat([corners[..., :2].minimum(corners[..., 2:]), corners[..., :2].maximum(corners[..., 2:])], dim=-1)


def padding() -> Tensor:
    mask = torch.zeros(2, *GRID, dtype=torch.bool)
    mask[1, 3:] = True
    return mask


def literal_bias(module: BoxRelativeAttention, corners: Tensor) -> Tensor:
    """The published form: a sum over [B, Q, h, w, heads], brought into the layout of the attention."""
    h, w = GRID
    x = (torch.arange(w) + 0.5) * module.stride
    y = (torch.arange(h) + 0.5) * module.stride
    of_columns = module.cpb_mlp1(torch.stack([corners[..., None, 0] - x, corners[..., None, 2] - x], dim=-1))
    of_rows = module.cpb_mlp2(torch.stack([corners[..., None, 1] - y, corners[..., None, 3] - y], dim=-1))
    return (of_columns[:, :, None] + of_rows[:, :, :, None]).flatten(2, 3).permute(0, 3, 1, 2)


def test_the_bias_is_bit_identical_to_the_literal_form() -> None:
    module = attention()
    got = module.bias(boxes(), torch.zeros(2, *GRID, dtype=torch.bool))
    assert torch.equal(got, literal_bias(module, boxes()))
    assert (module.bias(boxes(), padding()) == -torch.inf).equal(padding().flatten(1)[:, None, None].expand_as(got))


def test_chunks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, query, cells = attention(), torch.randn(2, 9, 16), torch.randn(2, 35, 16)
    whole = module(query, cells, cells, boxes(), padding())
    monkeypatch.setattr(decoder, "BIAS_CHUNK", 2 * 4 * 35 * 2)
    torch.testing.assert_close(module(query, cells, cells, boxes(), padding()), whole)


def test_padded_cells_are_excluded_whatever_the_bias() -> None:
    module, query, cells = attention(), torch.randn(2, 9, 16), torch.randn(2, 35, 16)
    with torch.no_grad():
        for network in (module.cpb_mlp1, module.cpb_mlp2):
            network[2].weight.mul_(1000)
    changed = torch.where(padding().flatten(1)[..., None], cells + 5, cells)
    got, want = (module(query, x, x, boxes(), padding()) for x in (changed, cells))
    assert torch.equal(got, want)


def test_gradients_reach_the_networks_of_the_bias() -> None:
    module = attention().requires_grad_(True)
    module(torch.randn(2, 9, 16), torch.randn(2, 35, 16), torch.randn(2, 35, 16), boxes(), padding()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_boxes_are_computed_in_float32() -> None:
    head, x = Perceptron(16, 16, 4, 3).requires_grad_(False), torch.randn(2, 16)
    want = head(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.bfloat16
        assert torch.equal(in_float32(head, x), want)
    rounded = in_float32(head.bfloat16(), x.bfloat16())
    torch.testing.assert_close(rounded, head.float()(x.bfloat16().float()))
    assert rounded.dtype == torch.float32 and isinstance(head, nn.Module)
