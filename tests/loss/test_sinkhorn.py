from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov3.distributed import get_rank, new_subgroups
from dinov3.loss import DINOLoss, iBOTPatchLoss
from dinov3.loss.sinkhorn import sinkhorn_knopp
from tests.multiprocess import run_ranks

from . import naive


def logits(n_samples: int, n_prototypes: int, scale: float, seed: int = 0) -> Tensor:
    return torch.randn(n_samples, n_prototypes, generator=torch.Generator().manual_seed(seed)) * scale


def uniform_logits(n_samples: int, n_prototypes: int, bound: float) -> Tensor:
    return (torch.rand(n_samples, n_prototypes, generator=torch.Generator().manual_seed(1)) * 2 - 1) * bound


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("n_iterations", [1, 3, 10])
def test_equals_the_log_domain_in_float64(scale: float, n_iterations: int) -> None:
    x = logits(24, 40, scale)
    torch.testing.assert_close(
        sinkhorn_knopp(x, 0.04, n_iterations).double(), naive.sinkhorn(x, 0.04, n_iterations), atol=1e-5, rtol=1e-4
    )


def test_equals_the_textbook_form_where_that_is_finite() -> None:
    x = logits(12, 20, 0.3)
    probs = (x / 0.07).exp()
    for _ in range(3):
        probs = probs / probs.sum(0)
        probs = probs / probs.sum(1, keepdim=True)
    torch.testing.assert_close(sinkhorn_knopp(x, 0.07), probs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (2, 5), (1, 7)])
def test_is_finite_and_normalised_for_huge_logits(shape: tuple[int, int]) -> None:
    x = uniform_logits(*shape, bound=1e3)
    probs = sinkhorn_knopp(x, 0.04)
    assert probs.isfinite().all()
    torch.testing.assert_close(probs.sum(1), torch.ones(len(x)))
    # Rounding of the logits alone moves the exponents by 1e-3.
    torch.testing.assert_close(probs.double(), naive.sinkhorn(x, 0.04), atol=5e-3, rtol=0)


def test_prototype_and_sample_far_below_the_others_stay_finite() -> None:
    x = logits(16, 12, 0.3)
    x[:, 3] = -1e3
    x[:, 4] = torch.linspace(-1e3, 1e3, 16)
    x[5] -= 500
    probs = sinkhorn_knopp(x, 0.04)
    torch.testing.assert_close(probs.double(), naive.sinkhorn(x, 0.04), atol=1e-4, rtol=0)
    # The balance is over the batch, so even the worst prototype gets its share.
    assert probs[:, 3].sum() > 0.1


def test_shift_of_a_prototype_or_of_everything_changes_nothing_but_shift_of_a_sample_does() -> None:
    x = logits(6, 20, 0.3, seed=3) * torch.tensor([0.05, 0.1, 0.3, 0.5, 0.7, 0.9]).view(-1, 1)
    probs = sinkhorn_knopp(x, 0.07)
    torch.testing.assert_close(sinkhorn_knopp(x + 2, 0.07), probs, atol=1e-5, rtol=0)
    torch.testing.assert_close(sinkhorn_knopp(x + torch.arange(20.0), 0.07), probs, atol=1e-4, rtol=0)
    per_sample = sinkhorn_knopp(x - x.amax(1, keepdim=True), 0.07)
    assert (per_sample - probs).abs().max() > 0.01


def test_input_is_neither_changed_nor_differentiated() -> None:
    x = logits(4, 6, 1.0).requires_grad_()
    before = x.detach().clone()
    probs = sinkhorn_knopp(x, 0.04)
    assert torch.equal(x, before)
    assert not probs.requires_grad


def test_bfloat16_logits_give_float32_targets() -> None:
    x = logits(8, 16, 1.0).bfloat16()
    probs = sinkhorn_knopp(x, 0.04)
    assert probs.dtype == torch.float32
    assert torch.equal(probs, sinkhorn_knopp(x.float(), 0.04))


def test_no_iterations_are_an_error() -> None:
    with pytest.raises(ValueError, match="n_iterations is 0, expected at least 1"):
        sinkhorn_knopp(logits(4, 6, 1.0), 0.04, 0)


def test_both_losses_use_the_same_function() -> None:
    x = logits(8, 16, 1.0)
    want = sinkhorn_knopp(x, 0.05, 2)
    ibot = iBOTPatchLoss(16)
    assert torch.equal(DINOLoss(16).sinkhorn_knopp_teacher(x, teacher_temp=0.05, n_iterations=2), want)
    assert torch.equal(ibot.sinkhorn_knopp_teacher(x, 0.05, None, 2), want)


def test_number_of_patches_is_left_alone() -> None:
    count = torch.tensor([8])
    iBOTPatchLoss(16).sinkhorn_knopp_teacher(logits(8, 16, 1.0), 0.05, n_masked_patches_tensor=count)
    assert count.tolist() == [8]


def test_no_masked_patch_at_all() -> None:
    assert iBOTPatchLoss(16).sinkhorn_knopp_teacher(torch.zeros(0, 16), 0.05).shape == (0, 16)


def on_each_rank(rank: int, world_size: int) -> dict[str, Tensor]:
    x, huge = logits(9, 12, 1.0), uniform_logits(9, 12, 1e3)
    rows = slice(0, 6) if rank == 0 else slice(6, 9)
    results = {
        "uneven": sinkhorn_knopp(x[rows], 0.04),
        "huge": sinkhorn_knopp(huge[rows], 0.04),
        "empty": sinkhorn_knopp(x if rank == 0 else x[:0], 0.04),
    }
    new_subgroups([[0], [1]])
    return results | {"own_subgroup": sinkhorn_knopp(x[rows], 0.04), "rank": torch.tensor(get_rank())}


@pytest.mark.distributed
def test_ranks_balance_together_within_their_subgroup() -> None:
    x, huge = logits(9, 12, 1.0), uniform_logits(9, 12, 1e3)
    first, second = run_ranks(on_each_rank, 2)
    joined = {key: torch.cat([first[key], second[key]]) for key in ("uneven", "huge", "empty")}
    torch.testing.assert_close(joined["uneven"], sinkhorn_knopp(x, 0.04), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(joined["huge"], sinkhorn_knopp(huge, 0.04), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(joined["empty"], sinkhorn_knopp(x, 0.04), atol=1e-6, rtol=1e-5)
    assert second["empty"].shape == (0, 12)
    torch.testing.assert_close(first["own_subgroup"], sinkhorn_knopp(x[:6], 0.04))
    torch.testing.assert_close(second["own_subgroup"], sinkhorn_knopp(x[6:], 0.04))
