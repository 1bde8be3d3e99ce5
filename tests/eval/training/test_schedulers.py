"""Schedules of dense heads: what reaches the optimizer, where they end, and how they continue after a resume."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dinov3.eval.training.schedulers import SCHEDULERS, WarmupMultiStepLR, WarmupOneCycleLR, build_scheduler


def adamw(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates or (0.1,)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99))


def rates_of(scheduler: Any, n_steps: int, group: int = 0) -> list[float]:
    """The rate before each of the next steps."""
    rates = []
    for _ in range(n_steps):
        rates.append(float(scheduler.optimizer.param_groups[group]["lr"]))
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def test_peak_of_the_nyu_recipe_is_three_quarters_at_the_end_of_the_warmup() -> None:
    rates = rates_of(WarmupOneCycleLR(adamw(), 300, warmup_iters=100, max_lr=1.0), 300)
    assert max(rates) == pytest.approx(0.75, abs=0.01)
    assert abs(rates.index(max(rates)) - 100) <= 1
    assert rates[0] == pytest.approx(1.0 / 1000)
    assert rates[-1] == pytest.approx(1.0 / 25_000)


def test_there_is_no_momentum_in_the_warmup() -> None:
    optimizer = adamw()
    scheduler = WarmupOneCycleLR(optimizer, 10, warmup_iters=4, max_lr=1.0)
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["betas"])
        optimizer.step()
        scheduler.step()
    assert [beta1 for beta1, _ in seen[:4]] == [0.0] * 4
    assert seen[4][0] == pytest.approx(0.85)
    assert all(0.85 <= beta1 < 0.95 for beta1, _ in seen[4:])
    assert {beta2 for _, beta2 in seen} == {0.99}


def test_an_infinite_final_factor_ends_at_zero() -> None:
    scheduler = WarmupOneCycleLR(adamw(), 20, warmup_iters=5, warmup_ratio=0.1, max_lr=1.0, final_div_factor=math.inf)
    rates = rates_of(scheduler, 20)
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == 0.0


def test_each_group_has_its_own_peak_without_max_lr() -> None:
    scheduler = WarmupOneCycleLR(adamw(0.2, 0.1), 20, warmup_iters=2)
    for _ in range(20):
        first, second = (group["lr"] for group in scheduler.optimizer.param_groups)
        assert first == pytest.approx(2 * second)
        scheduler.optimizer.step()
        scheduler.step()


def test_groups_without_a_peak_of_their_own_keep_their_rate() -> None:
    scheduler = WarmupOneCycleLR(adamw(0.2, 0.1, 0.3), 20, max_lr=[0.5, None])
    assert scheduler.max_lrs == [0.5, 0.1, 0.3]
    with pytest.raises(ValueError, match="max_lr has 2 rates for an optimizer of 1 parameter groups"):
        WarmupOneCycleLR(adamw(), 20, max_lr=[0.5, 0.5])


def test_no_more_steps_than_the_schedule_has() -> None:
    scheduler = WarmupOneCycleLR(adamw(), 5, max_lr=1.0)
    rates_of(scheduler, 5)
    with pytest.raises(ValueError, match="total_steps=5"):
        scheduler.step()
    assert scheduler.last_epoch == 5


@pytest.mark.parametrize("warmup_iters", [10, 11, -1])
@pytest.mark.parametrize("schedule", [WarmupOneCycleLR, WarmupMultiStepLR])
def test_a_warmup_that_does_not_end_is_refused(schedule: Any, warmup_iters: int) -> None:
    with pytest.raises(ValueError, match=f"warmup_iters={warmup_iters} of total_steps=10"):
        schedule(adamw(), 10, warmup_iters=warmup_iters, max_lr=1.0)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="anneal_strategy='cosine'"):
        WarmupOneCycleLR(adamw(), 10, anneal_strategy="cosine")
    with pytest.raises(ValueError, match="final_div_factor=0"):
        WarmupOneCycleLR(adamw(), 10, final_div_factor=0)
    with pytest.raises(ValueError, match="SGD has no betas: set use_beta1=False"):
        WarmupOneCycleLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), 10)


def test_multi_step_makes_all_steps_and_holds_the_last_rate() -> None:
    rates = rates_of(WarmupMultiStepLR(adamw(), 10, warmup_iters=2, max_lr=1.0), 13)
    assert rates == pytest.approx([0.5] + [1.0] * 3 + [0.1] * 4 + [0.01] + [0.001] * 4)


def test_one_milestone_counts_per_step_and_none_in_the_warmup() -> None:
    scheduler = WarmupMultiStepLR(adamw(), 10, milestones=[0.1, 0.1, 0.8], warmup_iters=4, max_lr=1.0)
    assert rates_of(scheduler, 10) == pytest.approx([0.25, 0.5, 0.75, 0.1] + [0.01] * 3 + [0.001] * 3)


KWARGS: dict[str, dict[str, Any]] = {
    "ConstantLR": {"factor": 0.5},
    "LinearLR": {"start_factor": 0.1},
    "MultiStepLR": {"milestones": [4, 8]},
    "PolynomialLR": {"power": 1.0},
    "StepLR": {"step_size": 3},
    "OneCycleLR": {},
    "WarmupOneCycleLR": {"warmup_iters": 5},
    "WarmupMultiStepLR": {"warmup_iters": 3},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_resumed_schedule_continues_exactly(name: str) -> None:
    def build() -> Any:
        return build_scheduler(name, adamw(0.1), 0.1, 12, KWARGS[name])

    whole = build()
    first = build()
    assert rates_of(first, 7) == rates_of(whole, 7)
    saved = copy.deepcopy((first.optimizer.state_dict(), first.state_dict()))
    resumed = build()
    resumed.optimizer.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(5):
        assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
        assert resumed.optimizer.param_groups[0]["betas"] == whole.optimizer.param_groups[0]["betas"]
        for scheduler in (resumed, whole):
            scheduler.optimizer.step()
            scheduler.step()


def test_a_resumed_schedule_keeps_the_groups_own_peaks() -> None:
    first = WarmupOneCycleLR(adamw(0.1), 12, warmup_iters=5)
    rates_of(first, 7)
    optimizer = adamw(0.1)
    optimizer.load_state_dict(first.optimizer.state_dict())
    resumed = WarmupOneCycleLR(optimizer, 12, warmup_iters=5)
    resumed.load_state_dict(first.state_dict())
    assert resumed.max_lrs == [0.1]


@pytest.mark.parametrize("name", ["ConstantLR", "LinearLR", "PolynomialLR"])
def test_the_length_reaches_pytorchs_schedules(name: str) -> None:
    scheduler = build_scheduler(name, adamw(0.1), 0.1, 20, {})
    assert scheduler.total_iters == 20  # type: ignore[attr-defined]


def test_a_polynomial_schedule_falls_over_all_steps() -> None:
    rates = rates_of(build_scheduler("PolynomialLR", adamw(0.1), 0.1, 20, {"power": 1.0}), 20)
    assert rates == pytest.approx([0.1 * (1 - step / 20) for step in range(20)])


def test_the_callers_settings_win_and_stay_as_they_are() -> None:
    kwargs = {"total_iters": 8, "power": 1.0}
    scheduler: Any = build_scheduler("PolynomialLR", adamw(0.1), 0.1, 20, kwargs)
    assert scheduler.total_iters == 8
    assert kwargs == {"total_iters": 8, "power": 1.0}
    nothing: dict[str, Any] = {}
    build_scheduler("WarmupOneCycleLR", adamw(0.1), 0.1, 20, nothing)
    assert nothing == {}


def test_settings_from_yaml_end_as_plain_values() -> None:
    kwargs = OmegaConf.create({"milestones": [0.25, 0.5], "warmup_iters": 2})
    scheduler = build_scheduler("WarmupMultiStepLR", adamw(0.1), 0.1, 20, kwargs)  # type: ignore[arg-type]
    assert scheduler.state_dict()["passing_steps"] == [5, 10]


def test_the_learning_rate_is_the_peak() -> None:
    for name in ("OneCycleLR", "WarmupMultiStepLR"):
        assert max(rates_of(build_scheduler(name, adamw(0.1), 0.4, 20), 20)) == pytest.approx(0.4)
    assert build_scheduler("WarmupOneCycleLR", adamw(0.1), 0.4, 20).max_lrs == [0.4]  # type: ignore[attr-defined]
    own = build_scheduler("WarmupOneCycleLR", adamw(0.1, 0.2), None, 20)
    assert own.max_lrs == [0.1, 0.2]  # type: ignore[attr-defined]


def test_unknown_settings_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        build_scheduler("StepLR", adamw(0.1), 0.1, 20, {"step_size": 3, "gama": 0.5})
    assert "gama=0.5" in caplog.text and "'gamma'" in caplog.text


def test_an_unknown_type_is_named() -> None:
    with pytest.raises(ValueError, match="'WarmupOneCycle'.*did you mean 'WarmupOneCycleLR'"):
        build_scheduler("WarmupOneCycle", adamw(0.1), 0.1, 20)
