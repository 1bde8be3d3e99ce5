from __future__ import annotations

import pytest
import torch
from torch import nn

from dinov3.layers import CausalSelfAttention, LinearKMaskedBias, RopePositionEmbedding, SelfAttention
from dinov3.layers.attention import rope_with_prefix


def test_prefix_tokens_are_not_rotated() -> None:
    attention = SelfAttention(16, num_heads=1)
    rope = RopePositionEmbedding(16, num_heads=1, dtype=torch.float32)(H=2, W=2)
    q, k = torch.randn(2, 1, 1, 7, 16)
    rotated_q, rotated_k = attention.apply_rope(q, k, rope)
    assert torch.equal(rotated_q[..., :3, :], q[..., :3, :]) and torch.equal(rotated_k[..., :3, :], k[..., :3, :])
    assert (rotated_q[..., 3:, :] - q[..., 3:, :]).abs().amin(-1).max() > 0
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1))


def test_more_rotations_than_tokens_are_refused() -> None:
    rope = RopePositionEmbedding(16, num_heads=1)(H=2, W=2)
    with pytest.raises(AssertionError, match="4 rotations for 3 tokens"):
        SelfAttention(16, num_heads=1).apply_rope(*torch.randn(2, 1, 1, 3, 16), rope)


def test_rotations_with_a_prefix_are_those_that_are_extended_at_each_use() -> None:
    attention = SelfAttention(16, num_heads=1)
    rope = RopePositionEmbedding(16, num_heads=1, dtype=torch.float32)(H=2, W=2)
    q, k = torch.randn(2, 1, 1, 7, 16)
    extended = rope_with_prefix(rope, 3)
    assert extended[0].shape == extended[1].shape == (7, 16)
    for found, wanted in zip(attention.apply_rope(q, k, extended), attention.apply_rope(q, k, rope), strict=True):
        assert torch.equal(found, wanted)


def test_lists_attend_each_on_its_own() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16, num_heads=2, qkv_bias=True)
    xs = [torch.randn(2, 5, 16), torch.randn(3, 9, 16)]
    ropes = [RopePositionEmbedding(16, num_heads=2, dtype=torch.float32)(H=2, W=2), None]
    for got, x, rope in zip(attention.forward_list(xs, rope_list=ropes), xs, ropes, strict=True):
        torch.testing.assert_close(got, attention(x, rope=rope))


def test_masked_bias_starts_as_nan_and_silences_keys() -> None:
    linear = LinearKMaskedBias(4, 6)
    assert linear.bias_mask.isnan().all() and "bias_mask" in linear.state_dict()
    linear.bias_mask.copy_(torch.tensor([1.0, 1, 0, 0, 1, 1]))
    got = linear(torch.zeros(1, 4))[0]
    assert torch.equal(got, linear.bias * linear.bias_mask)
    got.sum().backward()
    assert linear.bias.grad is not None and linear.bias.grad.tolist() == [1, 1, 0, 0, 1, 1]
    assert "bias_mask" not in LinearKMaskedBias(4, 6, bias=False).state_dict()


def test_state_dicts_that_leave_the_masked_bias_nan_are_refused() -> None:
    state = LinearKMaskedBias(4, 6).state_dict()
    without = {name: tensor for name, tensor in state.items() if name != "bias_mask"}
    with pytest.raises(RuntimeError, match="0.bias_mask is NaN: the state dict is of a model that was never init"):
        nn.Sequential(LinearKMaskedBias(4, 6)).load_state_dict({f"0.{name}": t for name, t in state.items()})
    linear = LinearKMaskedBias(4, 6)
    with pytest.raises(RuntimeError, match=r"bias_mask is missing, .*init_weights\(\)"):
        linear.load_state_dict(without, strict=False)
    mask = torch.tensor([1.0, 1, 0, 0, 1, 1])
    linear.bias_mask.copy_(mask)
    assert linear.load_state_dict(without, strict=False).missing_keys == ["bias_mask"]
    assert torch.equal(linear.bias_mask, mask)
    LinearKMaskedBias(4, 6).load_state_dict(without | {"bias_mask": mask})


def test_widths_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="multiple of 3"):
        LinearKMaskedBias(4, 7)
    for attention in (SelfAttention, CausalSelfAttention):
        with pytest.raises(ValueError, match="multiple of num_heads, got 10 and 3"):
            attention(10, num_heads=3)


def test_causal_attention_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    attention, x = CausalSelfAttention(8, num_heads=2), torch.randn(1, 4, 8)
    changed = x.clone()
    changed[:, 3] += 1
    assert torch.equal(attention(x)[:, :3], attention(changed)[:, :3])
    assert not torch.equal(attention(x, is_causal=False)[:, :3], attention(changed, is_causal=False)[:, :3])


def test_causal_initialisation() -> None:
    torch.manual_seed(0)
    attention = CausalSelfAttention(64, num_heads=2, qkv_bias=True)
    attention.init_weights(factor=0.5)
    assert abs(attention.qkv.weight.std() / 64**-0.5 - 1) < 0.05
    assert abs(attention.proj.weight.std() / (0.5 * 64**-0.5) - 1) < 0.05
    assert not attention.qkv.bias.any() and not attention.proj.bias.any()
