"""The attention of all crops in one call; xformers itself needs a GPU, so that a stand-in does what it documents."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.layers import SelfAttention, SelfAttentionBlock, set_attention_backend
from dinov3.models.vision_transformer import DinoVisionTransformer

CUDA = torch.device("cuda")


class BlockDiagonalMask:
    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    @classmethod
    def from_seqlens(cls, lengths: list[int], *, device: torch.device) -> BlockDiagonalMask:
        assert device.type == "cpu"
        return cls(lengths)


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, *, attn_bias: BlockDiagonalMask) -> Tensor:
    """[1, rows, heads, d] to the same, in which a row attends to those of its own sequence."""
    assert sum(attn_bias.lengths) == q.shape[1]
    numbers = torch.repeat_interleave(torch.arange(len(attn_bias.lengths)), torch.tensor(attn_bias.lengths))
    mask = numbers[:, None] == numbers[None]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Install the stand-in; lists the sequence lengths of each call."""
    seen: list[list[int]] = []

    def attention(*args: Any, attn_bias: BlockDiagonalMask) -> Tensor:
        seen.append(attn_bias.lengths)
        return memory_efficient_attention(*args, attn_bias=attn_bias)

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    attn_bias = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
    ops.fmha = types.SimpleNamespace(attn_bias=attn_bias)  # type: ignore[attr-defined]
    ops.memory_efficient_attention = attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return seen


def make_vit() -> DinoVisionTransformer:
    torch.manual_seed(0)
    vit = DinoVisionTransformer(
        embed_dim=32, depth=2, num_heads=4, patch_size=8, n_storage_tokens=2, mask_k_bias=True, layerscale_init=1.0
    )
    vit.init_weights()
    return vit


def test_crops_of_two_sizes_give_the_same_features_in_one_call(calls: list[list[int]]) -> None:
    vit = make_vit()
    crops, masks = [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)], [torch.rand(2, 16) < 0.4, None]
    expected = vit(crops, masks=masks, is_training=True)
    assert not calls
    set_attention_backend(vit, "xformers", CUDA)
    got = vit(crops, masks=masks, is_training=True)
    assert calls == [[19, 19, 7, 7, 7]] * 2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a["x_prenorm"], b["x_prenorm"], rtol=1e-5, atol=1e-5)


def test_gradients_are_the_same(calls: list[list[int]]) -> None:
    torch.manual_seed(0)
    block = SelfAttentionBlock(32, 4)
    x = [torch.randn(2, 9, 32, requires_grad=True), torch.randn(1, 4, 32, requires_grad=True)]
    gradients = []
    for backend in ("sdpa", "xformers"):
        set_attention_backend(block, backend, CUDA)
        total = sum(out.square().sum() for out in block(x))
        gradients.append(torch.autograd.grad(total, x))
    assert len(calls) == 1
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_tensor_needs_no_packing(calls: list[list[int]]) -> None:
    attention = SelfAttention(32, 4)
    set_attention_backend(attention, "xformers", CUDA)
    attention(torch.randn(2, 5, 32))
    assert not calls


def test_backends_that_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'flash' is unknown; use sdpa or xformers"):
        set_attention_backend(make_vit(), "flash", CUDA)
    with pytest.raises(ValueError, match="CUDA only, not on cpu: use sdpa"):
        set_attention_backend(make_vit(), "xformers", torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install xformers"):
        set_attention_backend(make_vit(), "xformers", CUDA)
