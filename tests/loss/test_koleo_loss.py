from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov3.distributed import new_subgroups
from dinov3.loss import KoLeoLoss, KoLeoLossDistributed
from tests.multiprocess import run_ranks

from . import naive


def features(n: int, dim: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_is_the_mean_negative_log_distance_to_the_nearest_other(eps: float) -> None:
    x = features(7)
    loss = KoLeoLoss()(x, eps=eps)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive.koleo(x, x, 0, eps=eps).item(), rel=1e-5)


def test_gradient_flows_through_both_ends() -> None:
    x = features(4).requires_grad_()
    KoLeoLoss()(x).backward()
    want = naive.finite_differences(lambda y: naive.koleo(y, y, 0), x.detach())
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", [KoLeoLoss(), KoLeoLossDistributed()], ids=["local", "distributed"])
def test_bfloat16_features_are_computed_in_float32(loss: KoLeoLoss | KoLeoLossDistributed) -> None:
    x = features(16, 4096)
    got = loss(x.bfloat16())
    assert got.dtype == torch.float32
    assert abs(got - loss(x)) < 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(x), KoLeoLoss()(x))


def test_opposite_features_are_neighbours_of_each_other() -> None:
    x = features(1)
    assert KoLeoLoss()(torch.cat([x, -x])).item() == pytest.approx(-torch.tensor(2.0).log().item(), rel=1e-5)


def test_equal_features_stay_finite() -> None:
    x = features(1).repeat(3, 1).requires_grad_()
    loss = KoLeoLoss()(x)
    loss.backward()
    assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()


def test_single_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 2 images per process .* got 1"):
        KoLeoLoss()(features(1))


@pytest.mark.parametrize("topk", [1, 3, 6])
def test_topk_neighbours_without_a_process_group(topk: int) -> None:
    x = features(7)
    loss = KoLeoLossDistributed(topk=topk)(x)
    assert loss.item() == pytest.approx(naive.koleo(x, x, 0, topk).item(), rel=1e-5)


def test_topk_that_would_include_the_image_itself_is_an_error() -> None:
    with pytest.raises(ValueError, match="topk 3 needs groups of at least 4 images, got 3"):
        KoLeoLossDistributed(topk=3)(features(3))


@pytest.mark.parametrize("size", [3, 8, 2])
def test_group_that_does_not_fit_the_batch_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match=f"loss_group_size {size} does not fit 4 images per process on 1 processes"):
        KoLeoLossDistributed(loss_group_size=size)(features(4))


@pytest.mark.parametrize("arguments", [{"topk": 0}, {"loss_group_size": 0}])
def test_settings_below_one_are_an_error(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="is 0, expected at least 1"):
        KoLeoLossDistributed(**arguments)


def on_each_rank(rank: int, world_size: int) -> dict[str, Tensor]:
    results = {}
    for name, size in (("all", None), ("own", 3)):
        x = features(6)[3 * rank :][:3].requires_grad_()
        loss = KoLeoLossDistributed(topk=2, loss_group_size=size)(x)
        loss.backward()
        assert x.grad is not None
        results |= {name: loss.detach(), f"{name}.grad": x.grad}
    new_subgroups([[0], [1]])
    # Students of different widths: gathering over the world would fail.
    return results | {"subgroup": KoLeoLossDistributed()(features(3, dim=4 + rank))}


@pytest.mark.distributed
def test_neighbours_on_other_ranks() -> None:
    ranks = run_ranks(on_each_rank, 2)
    x = features(6)

    def total(y: Tensor) -> Tensor:
        return naive.koleo(y[:3], y, 0, 2) + naive.koleo(y[3:], y, 3, 2)

    gradient = naive.finite_differences(total, x)
    for rank, result in enumerate(ranks):
        own = x[3 * rank :][:3]
        assert result["all"].item() == pytest.approx(naive.koleo(own, x, 3 * rank, 2).item(), rel=1e-5)
        # The sum over ranks of what they back-propagate, so that sharding's average is the mean loss's gradient.
        torch.testing.assert_close(result["all.grad"].double(), gradient[3 * rank :][:3], atol=1e-5, rtol=1e-4)
        assert result["own"].item() == pytest.approx(naive.koleo(own, own, 0, 2).item(), rel=1e-5)
        assert result["subgroup"].item() == pytest.approx(KoLeoLoss()(features(3, dim=4 + rank)).item(), rel=1e-5)
