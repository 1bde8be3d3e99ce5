"""Depth metrics by their formulas, without valid pixels; alignment; the pixels that count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov3.eval.depth.metrics import (
    DEPTH_METRICS,
    DEPTH_METRICS_NAME,
    EvalCropType,
    align_depth_least_square,
    calculate_depth_metrics,
    make_valid_mask,
)

SHAPE = (1, 1, 12, 15)


def maps(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Measurement with holes, prediction and mask."""
    generator = torch.Generator().manual_seed(seed)
    gt, factor, hole, mask = (torch.rand(SHAPE, generator=generator) for _ in range(4))
    gt = 0.5 + 8 * gt
    return gt.masked_fill(hole < 0.2, 0.0), gt * (0.6 + factor), mask < 0.8


def test_metrics_are_their_formulas() -> None:
    gt, pred, mask = maps()
    valid = (mask & (gt > 0)).numpy()
    g, p = gt.double().numpy()[valid], pred.double().numpy()[valid]
    ratio, log = np.maximum(g / p, p / g), np.log(g) - np.log(p)
    want = {
        "a1": (ratio < 1.25).mean(),
        "a2": (ratio < 1.25**2).mean(),
        "a3": (ratio < 1.25**3).mean(),
        "abs_rel": (abs(g - p) / g).mean(),
        "rmse": ((g - p) ** 2).mean() ** 0.5,
        "log_10": abs(np.log10(g) - np.log10(p)).mean(),
        "rmse_log": (log**2).mean() ** 0.5,
        "silog": 100 * ((log**2).mean() - log.mean() ** 2) ** 0.5,
        "sq_rel": ((g - p) ** 2 / g).mean(),
        "mae": abs(g - p).mean(),
    }
    got = {name: value.item() for name, value in calculate_depth_metrics(gt, pred, mask)._asdict().items()}
    assert got == pytest.approx(want, rel=1e-5)


def test_without_a_valid_pixel_everything_is_nan() -> None:
    gt, pred, mask = maps()
    for metrics in (
        calculate_depth_metrics(gt, pred, torch.zeros_like(mask)),
        calculate_depth_metrics(torch.zeros_like(gt), pred, mask),
        calculate_depth_metrics(gt[:0], pred[:0]),
    ):
        assert metrics._fields == DEPTH_METRICS_NAME
        assert all(math.isnan(value) for value in metrics)


def test_silog_of_a_constant_ratio_is_zero() -> None:
    gt = maps()[0].clamp(min=0.1)
    metrics = calculate_depth_metrics(gt, 1.3 * gt)
    assert metrics.silog.item() == pytest.approx(0.0, abs=1e-4)
    assert metrics.rmse_log.item() == pytest.approx(math.log(1.3), rel=1e-5)


def test_without_a_mask_all_pixels_count() -> None:
    gt, pred, _ = maps()
    assert calculate_depth_metrics(gt, pred).abs_rel.item() == math.inf
    assert calculate_depth_metrics(gt, pred, torch.ones_like(gt, dtype=torch.bool)).abs_rel.isfinite()


def test_metrics_are_asked_for_by_name_or_item() -> None:
    gt, pred, mask = maps()
    by_item = calculate_depth_metrics(gt, pred, mask, [m for m in DEPTH_METRICS if m.name in ("a1", "mae")])
    by_name = calculate_depth_metrics(gt, pred, mask, ["mae", "a1"])
    assert (by_item.a1, by_item.mae) == (by_name.a1, by_name.mae)
    assert math.isnan(by_name.rmse)
    with pytest.raises(ValueError, match="'rsme'.*did you mean 'rmse'"):
        calculate_depth_metrics(gt, pred, mask, ["rsme"])


def test_only_accuracies_are_better_when_higher() -> None:
    assert [metric.name for metric in DEPTH_METRICS if not metric.is_lower_better] == ["a1", "a2", "a3"]


def test_alignment_is_the_least_squares_fit() -> None:
    gt, pred, mask = maps()
    aligned, scale, shift = align_depth_least_square(gt, pred, mask)
    x, y = pred[mask].double().numpy(), gt[mask].double().numpy()
    want, *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], axis=1), y, rcond=None)
    assert (scale.item(), shift.item()) == pytest.approx(tuple(want), rel=1e-6)
    torch.testing.assert_close(aligned, scale * pred + shift)
    assert aligned.shape == pred.shape and aligned.dtype == pred.dtype


def test_alignment_is_exact_far_from_zero() -> None:
    pred = 5000 + torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    gt = 3 * pred.double() - 14990
    _, scale, shift = align_depth_least_square(gt, pred, torch.ones(SHAPE, dtype=torch.bool))
    assert (scale.item(), shift.item()) == pytest.approx((3.0, -14990.0), rel=1e-6)


def test_alignment_keeps_the_dtype_of_the_prediction() -> None:
    gt, pred, mask = maps()
    assert align_depth_least_square(gt, pred.half(), mask)[0].dtype == torch.float16
    assert align_depth_least_square(gt[0, 0], pred[0, 0], mask[0, 0])[0].shape == SHAPE[2:]


def test_alignment_without_a_valid_pixel_is_nan_and_not_zero() -> None:
    gt, pred, mask = maps()
    aligned, scale, shift = align_depth_least_square(gt, pred, torch.zeros_like(mask))
    assert aligned.isnan().all() and scale.isnan() and shift.isnan()


@pytest.mark.parametrize("value", [0.0, 0.37, 123.4])
def test_a_constant_prediction_becomes_the_mean_depth(value: float) -> None:
    gt, _, mask = maps()
    aligned, scale, shift = align_depth_least_square(gt, torch.full(SHAPE, value), mask)
    mean = gt[mask].mean()
    torch.testing.assert_close(aligned, mean.expand(SHAPE), rtol=1e-5, atol=1e-5)
    # Of all pairs with scale * value + shift = mean, the one nearest to 0.
    assert scale.item() == pytest.approx(value * shift.item(), rel=1e-4)


def test_alignment_may_be_fitted_on_a_smaller_map() -> None:
    gt, pred, mask = maps()
    whole = align_depth_least_square(gt, pred, mask)
    same = align_depth_least_square(gt, pred, mask, max_resolution=15)
    assert torch.equal(whole[0], same[0])
    reduced, scale, shift = align_depth_least_square(gt, pred, mask, max_resolution=5)
    want = align_depth_least_square(*(maps[..., ::3, ::3] for maps in (gt, pred, mask)))
    assert (scale, shift) == want[1:]
    torch.testing.assert_close(reduced, scale * pred + shift)


def test_maps_must_fit_together() -> None:
    gt, pred, mask = maps()
    with pytest.raises(ValueError, match=r"gt \(1, 1, 12, 15\), pred \(12, 15\)"):
        calculate_depth_metrics(gt, pred[0, 0], mask)
    with pytest.raises(ValueError, match=r"valid_mask \(12, 15\)"):
        align_depth_least_square(gt, pred, mask[0, 0])
    with pytest.raises(ValueError, match=r"one image.*\(2, 1, 12, 15\)"):
        align_depth_least_square(*(torch.cat([maps, maps]) for maps in (gt, pred, mask)))


def test_crops_are_also_known_by_name() -> None:
    x = torch.ones(1, 1, 48, 64)
    assert torch.equal(make_valid_mask(x, "NYU_EIGEN"), make_valid_mask(x, EvalCropType.NYU_EIGEN))
    assert make_valid_mask(x, "FULL").all()
    with pytest.raises(ValueError, match="'EIGEN': expected one of NYU_EIGEN, FULL"):
        make_valid_mask(x, "EIGEN")


def test_a_pixel_is_ignored_if_all_its_channels_are() -> None:
    x = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]]).view(1, 2, 1, 3)
    assert make_valid_mask(x).tolist() == [[[[False, True, True]], [[False, True, True]]]]
    assert make_valid_mask(x, ignored_value=-1.0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_no_measurement(value: float) -> None:
    x = torch.ones(1, 1, 2, 2)
    x[0, 0, 1, 0] = value
    assert make_valid_mask(x).tolist() == [[[[True, True], [False, True]]]]


def test_the_mask_is_memory_of_its_own() -> None:
    mask = make_valid_mask(torch.ones(1, 3, 2, 2))
    mask[0, 0] = False
    assert mask[0, 1:].all()


def test_other_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(480, 640\)"):
        make_valid_mask(torch.ones(480, 640))
