"""Depth losses where little or nothing is valid, their weights, and the count that a resume needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.eval.depth.loss import DepthLoss, GradientLogLoss, GradientLoss, L1Loss, LossType, MultiLoss, SigLoss

ALL_LOSSES = [SigLoss(warm_up=False), SigLoss(warm_iter=100), GradientLoss(), GradientLogLoss(), L1Loss()]
ALL_LOSSES += [MultiLoss(dict.fromkeys(LossType, 1.0))]  # type: ignore[list-item]


def maps(seed: int = 0, shape: tuple[int, ...] = (2, 1, 16, 18)) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, measurement and mask."""
    generator = torch.Generator().manual_seed(seed)
    pred, gt = (0.5 + 5 * torch.rand(shape, generator=generator) for _ in range(2))
    return pred.requires_grad_(), gt, torch.rand(shape, generator=generator) < 0.7


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda loss: type(loss).__name__)
def test_no_valid_pixel_costs_nothing(loss: DepthLoss) -> None:
    pred, gt, mask = maps()
    value = loss(pred, torch.zeros_like(gt), torch.zeros_like(mask))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(pred.grad, torch.zeros_like(pred))


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_single_pixel_is_finite(loss: DepthLoss) -> None:
    pred, gt, mask = maps()
    mask = torch.zeros_like(mask)
    mask[0, 0, 3, 4] = True
    value = loss(pred, gt, mask)
    value.backward()
    assert value.isfinite() and pred.grad.isfinite().all()
    assert pred.grad[~mask].abs().max() == 0


def test_a_single_pixel_has_no_variance() -> None:
    pred, gt = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 1.0)
    value = SigLoss(warm_up=False)(pred, gt)
    assert value.item() == pytest.approx((0.15 * torch.log(torch.tensor(2.001 / 1.001)) ** 2).sqrt().item())


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda loss: type(loss).__name__)
def test_invalid_pixels_may_hold_anything(loss: DepthLoss) -> None:
    results = []
    for junk in (1.0, 0.0, -5.0, torch.nan, torch.inf):
        pred, gt, mask = maps()
        value = loss(pred.masked_fill(~mask, -1e-3), gt.masked_fill(~mask, junk), mask)
        value.backward()
        results.append((value, pred.grad))
    for value, grad in results:
        assert torch.equal(value, results[0][0]) and torch.equal(grad, results[0][1])
        assert grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_perfect_prediction_costs_nothing(loss: DepthLoss) -> None:
    pred, _, mask = maps()
    value = loss(pred, pred.detach().clone(), mask)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert pred.grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda loss: type(loss).__name__)
def test_nothing_depends_on_values_that_a_device_would_have_to_send_back(loss: DepthLoss) -> None:
    pred, gt, mask = (tensor.detach().to("meta") for tensor in maps())
    assert loss(pred, gt, mask).shape == ()


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda loss: type(loss).__name__)
def test_half_precision_predictions_cost_float32(loss: DepthLoss) -> None:
    pred, gt, mask = maps()
    assert loss(pred.bfloat16(), gt, mask).dtype == torch.float32


def test_sigloss_is_the_spread_of_the_logarithms() -> None:
    pred, gt, mask = maps()
    g = ((pred + 1e-3).log() - (gt + 1e-3).log())[mask]
    want = (0.15 * g.mean() ** 2 + g.var()).sqrt()
    assert SigLoss(warm_up=False)(pred, gt, mask).item() == pytest.approx(want.item(), rel=1e-5)


def test_l1_loss_is_the_mean_difference() -> None:
    pred, gt, mask = maps()
    assert L1Loss()(pred, gt, mask).item() == pytest.approx((pred - gt).abs()[mask].mean().item(), rel=1e-5)


def test_gradients_are_taken_two_pixels_apart_at_strides_1_2_4_6() -> None:
    gt = torch.zeros(1, 1, 19, 19)
    ramp = torch.arange(19.0).expand(1, 1, 19, 19)
    want = 0.0
    for stride in (1, 2, 4, 6):
        side = len(range(0, 19, stride))
        want += side * (side - 2) * 2 * stride / side**2
    assert GradientLoss()(ramp, gt).item() == pytest.approx(want)


def test_the_variance_is_left_out_in_the_first_hundred_calls() -> None:
    pred, gt, _ = maps()
    loss = LossType.SIGLOSS.module()
    values = [loss(pred, gt).item() for _ in range(102)]
    assert len(set(values[:100])) == 1 and len(set(values[100:])) == 1
    assert values[99] < values[100]


def test_the_count_of_calls_survives_a_resume() -> None:
    pred, gt, mask = maps()
    first = MultiLoss({LossType.SIGLOSS: 1.0, LossType.L1: 0.5})
    uninterrupted = [first(pred, gt, mask).item() for _ in range(99)][-1:]
    state = first.loss_state()
    assert state == {"SIGLOSS": 99, "L1": 99}
    uninterrupted += [first(pred, gt, mask).item() for _ in range(2)]
    resumed = MultiLoss({LossType.SIGLOSS: 1.0, LossType.L1: 0.5})
    resumed.load_loss_state(state)
    assert [resumed(pred, gt, mask).item() for _ in range(2)] == uninterrupted[1:]
    assert uninterrupted[1] != uninterrupted[2]


def test_state_of_other_losses_is_refused() -> None:
    with pytest.raises(ValueError, match="losses GRADIENT_LOSS, this training has L1"):
        MultiLoss({LossType.L1: 1.0}).load_loss_state({"GRADIENT_LOSS": 3})


def test_losses_have_no_entries_in_a_state_dict() -> None:
    loss = MultiLoss(dict.fromkeys(LossType, 1.0))
    assert loss.state_dict() == {}
    assert set(loss.dict_losses) == {"SIGLOSS", "GRADIENT_LOSS", "GRADIENT_LOG_LOSS", "L1"}


def test_losses_are_weighted() -> None:
    pred, gt, mask = maps()
    both: Any = {"L1": 2.0, "GRADIENT_LOSS": 3.0}
    want = 2 * L1Loss()(pred, gt, mask) + 3 * GradientLoss()(pred, gt, mask)
    assert MultiLoss(both)(pred, gt, mask).item() == pytest.approx(want.item())


def test_losses_that_do_not_exist_are_named() -> None:
    with pytest.raises(ValueError, match="'SIGLOS'.*did you mean 'SIGLOSS'"):
        MultiLoss({"SIGLOS": 1.0})
    with pytest.raises(ValueError, match="losses is empty"):
        MultiLoss({})


def test_maps_of_different_shapes_are_refused() -> None:
    pred, gt, mask = maps()
    with pytest.raises(ValueError, match=r"pred \(2, 1, 16, 18\), gt \(2, 16, 18\)"):
        L1Loss()(pred, gt[:, 0], mask[:, 0])
