from __future__ import annotations

import math

import numpy as np
import pytest

from dinov3.train.schedules import CosineScheduler, linear_warmup_cosine_decay


def test_cosine_scheduler_entry_by_entry() -> None:
    scheduler = CosineScheduler(2.0, 1.0, 9, warmup_iters=3, start_warmup_value=0.5, freeze_iters=2)
    cosine = [1 + 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    np.testing.assert_allclose(scheduler.schedule, [0, 0, 0.5, 1.25, 2.0, *cosine], rtol=1e-15)


def test_cosine_scheduler_indices_outside() -> None:
    scheduler = CosineScheduler(2.0, 1.0, 5)
    assert scheduler[5] == scheduler[10**6] == 1.0
    assert scheduler[4] > 1.0
    assert scheduler[-1] == scheduler[4]
    assert isinstance(scheduler[0], float)


def test_truncated_cosine_reaches_the_final_value_at_its_last_iteration() -> None:
    scheduler = CosineScheduler(2.0, 1.0, 8, trunc_extra=0.5)
    angles = [math.pi * i / 11 for i in range(8)]
    cosine = [0.5 * (1 + math.cos(a)) for a in angles]
    want = [1 + (c - cosine[-1]) / (1 - cosine[-1]) for c in cosine]
    np.testing.assert_allclose(scheduler.schedule, want, rtol=1e-12)
    assert scheduler[7] == 1.0


@pytest.mark.parametrize("total", [3, 4])
@pytest.mark.parametrize("trunc_extra", [0.0, 0.25])
def test_hardly_any_cosine_is_finite(total: int, trunc_extra: float) -> None:
    scheduler = CosineScheduler(2.0, 1.0, total, warmup_iters=3, trunc_extra=trunc_extra)
    assert len(scheduler.schedule) == total
    assert np.isfinite(scheduler.schedule).all()


def test_warmup_longer_than_the_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="5 iterations cannot hold 2 frozen and 4 warm-up"):
        CosineScheduler(1.0, 0.0, 5, warmup_iters=4, freeze_iters=2)


def test_linear_warmup_cosine_decay_entry_by_entry() -> None:
    values = linear_warmup_cosine_decay(0.0, 1.0, 0.2, 4, 9, cosine_iterations=3)
    np.testing.assert_allclose(values, [0, 0.25, 0.5, 0.75, 1.0, 0.6, 0.2, 0.2, 0.2], rtol=1e-15)


def test_cosine_fills_the_rest_by_default_and_may_rise() -> None:
    values = linear_warmup_cosine_decay(0, 0.0, 2.0, 0, 5)
    np.testing.assert_allclose(values, [0, 1 - math.sqrt(0.5), 1, 1 + math.sqrt(0.5), 2], rtol=1e-12)


def test_cosine_of_one_or_no_iteration() -> None:
    assert linear_warmup_cosine_decay(0, 1.0, 2.0, 2, 5, cosine_iterations=1).tolist() == [0, 0.5, 1, 2, 2]
    assert linear_warmup_cosine_decay(0, 1.0, 2.0, 2, 4, cosine_iterations=0).tolist() == [0, 0.5, 2, 2]


def test_fractional_iterations_are_rounded() -> None:
    got = linear_warmup_cosine_decay(0.0, 1.0, 0.0, 2.6, 10.4, cosine_iterations=3.9)
    assert got.tolist() == linear_warmup_cosine_decay(0.0, 1.0, 0.0, 3, 10, cosine_iterations=4).tolist()
    scheduler = CosineScheduler(1.0, 0.0, 10.4, warmup_iters=2.6)
    assert scheduler.schedule.tolist() == CosineScheduler(1.0, 0.0, 10, warmup_iters=3).schedule.tolist()


@pytest.mark.parametrize("lengths", [(6, 5, None), (3, 5, 3)])
def test_parts_longer_than_the_whole_are_an_error(lengths: tuple[int, int, int | None]) -> None:
    with pytest.raises(ValueError, match="a schedule of 5 iterations cannot hold"):
        linear_warmup_cosine_decay(0.0, 1.0, 0.0, *lengths)
