from __future__ import annotations

import pytest
import torch

from dinov3.layers import CausalSelfAttentionBlock, SelfAttentionBlock


def block(**kwargs: object) -> SelfAttentionBlock:
    torch.manual_seed(0)
    return SelfAttentionBlock(8, num_heads=2, **kwargs)


def test_lists_equal_single_tensors() -> None:
    module = block(init_values=0.5)
    xs = [torch.randn(2, 3, 8), torch.randn(1, 5, 8)]
    for got, x in zip(module(xs), xs, strict=True):
        torch.testing.assert_close(got, module(x))


def test_stochastic_depth_touches_a_subset_and_keeps_the_expectation() -> None:
    module, x = block(drop_path=0.5), torch.randn(4, 3, 8)
    full = block().eval()(x) - x
    torch.manual_seed(1)
    draws = torch.stack([module.train()(x).detach() - x for _ in range(2000)])
    untouched = (draws == 0).all(-1).all(-1).float().mean()
    assert abs(untouched - 0.25) < 0.03  # half of the samples miss each of the two branches
    assert (draws.mean(0) - full).abs().mean() < 0.1 * full.abs().mean() + 0.05
    torch.testing.assert_close(module.eval()(x), x + full)


def test_one_sample_is_never_dropped() -> None:
    module, x = block(drop_path=0.9).train(), torch.randn(1, 3, 8)
    torch.testing.assert_close(module(x), module.eval()(x))


def test_gradients_reach_samples_that_were_dropped() -> None:
    module, x = block(drop_path=0.5).train(), torch.randn(4, 3, 8, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and x.grad.abs().amin((1, 2)).min() > 0


def test_wrong_inputs() -> None:
    x = torch.randn(1, 3, 8)
    with pytest.raises(AssertionError, match="expected a tensor or a list of tensors, got tuple"):
        block()((x, x))
    with pytest.raises(AssertionError, match="2 tensors, but 1 ropes"):
        block()([x, x], [None])


def test_text_block_is_causal_and_initialised() -> None:
    module = CausalSelfAttentionBlock(64, num_heads=2, ls_init_value=0.1)
    module.init_weights()
    assert abs(module.feed_forward.fc1.weight.std() / (2 * 64) ** -0.5 - 1) < 0.05
    x = torch.randn(1, 4, 64)
    changed = x.clone()
    changed[:, 3] += 1
    assert torch.equal(module(x)[:, :3], module(changed)[:, :3])
