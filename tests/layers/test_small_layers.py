from __future__ import annotations

import pytest
import torch
from torch import nn

from dinov3.layers import LayerScale, Mlp, PatchEmbed, RMSNorm, SwiGLUFFN
from dinov3.layers.dino_head import DINOHead
from dinov3.layers.layer_scale import add_scaled


@pytest.mark.parametrize("ffn", [Mlp, SwiGLUFFN])
def test_ffn_lists_equal_single_tensors(ffn: type[Mlp] | type[SwiGLUFFN]) -> None:
    module = ffn(8, 24, 4)
    xs = [torch.randn(2, 3, 8), torch.randn(5, 8)]
    for got, x in zip(module.forward_list(xs), xs, strict=True):
        torch.testing.assert_close(got, module(x))
        assert got.shape == (*x.shape[:-1], 4)


def test_patches_are_the_convolution_of_the_whole_patches() -> None:
    embed, x = PatchEmbed(patch_size=4, embed_dim=6), torch.randn(1, 3, 9, 14)
    got = embed(x)
    assert got.shape == (1, 6, 6)
    patch = x[0, :, 4:8, 8:12]
    want = (embed.proj.weight * patch).sum((1, 2, 3)) + embed.proj.bias
    torch.testing.assert_close(got[0, 5], want)
    assert torch.equal(PatchEmbed.forward(embed, x[..., :8, :12]), got)


def test_rms_norm_ignores_the_mean() -> None:
    got = RMSNorm(4)(torch.tensor([[2.0, 2.0, 2.0, 2.0]]))
    torch.testing.assert_close(got, torch.ones(1, 4), atol=1e-4, rtol=0)


def test_scaled_residuals_are_added_with_and_without_a_scale() -> None:
    x, residual, scale = torch.randn(2, 3), torch.randn(2, 3), LayerScale(3, 0.5)
    torch.testing.assert_close(add_scaled(x, residual, scale), x + 0.5 * residual)
    assert torch.equal(add_scaled(x, residual, nn.Identity()), x + residual)


def test_head_normalises_before_the_prototypes() -> None:
    head = DINOHead(8, 5, hidden_dim=16, bottleneck_dim=4)
    head.init_weights()
    x = torch.randn(3, 8)
    bottleneck = head(x, no_last_layer=True)
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(head(bottleneck, only_last_layer=True), head(x))
    assert head.last_layer.bias is None
