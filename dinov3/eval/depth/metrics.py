"""Errors of a predicted depth map, and the scale and shift that fit it best.

Notable:
- An image without a valid pixel has NaN metrics, silog too, so that means over images can leave it out. No scale and
  shift fits it: aligning gives NaN, never a map of zeros.
- With a mask, pixels with gt <= 0 are left out as well; without one, nothing is.
- silog is 100 times the standard deviation of the logarithms' difference, from deviations: the usual difference of two
  means can be negative by rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.utils.messages import did_you_mean

ACCURACY_FACTOR = 1.25
#: Predictions whose standard deviation is less than this share of their mean have no scale.
CONSTANT_TOLERANCE = 1e-7


@dataclass(frozen=True)
class DepthMetric:
    """What a metric is called, and in which direction it is better."""

    name: str
    is_lower_better: bool = True


class DepthMetrics(NamedTuple):
    """Metrics of one set of pixels: float32 scalars on the device of the maps; what was not asked for is NaN.

    `log_10` is infinite when it was not asked for, as in the official release.
    """

    a1: Tensor
    a2: Tensor
    a3: Tensor
    abs_rel: Tensor
    rmse: Tensor
    log_10: Tensor
    rmse_log: Tensor
    silog: Tensor
    sq_rel: Tensor
    mae: Tensor


DEPTH_METRICS = tuple(
    DepthMetric(name, is_lower_better=name not in ("a1", "a2", "a3")) for name in DepthMetrics._fields
)
DEPTH_METRICS_NAME = DepthMetrics._fields


def calculate_depth_metrics(
    gt: Tensor,
    pred: Tensor,
    valid_mask: Tensor | None = None,
    list_metrics: Iterable[str | DepthMetric] = DEPTH_METRICS_NAME,
) -> DepthMetrics:
    """Errors over the valid pixels of all maps together.

    Args:
        gt: measured depth, of any shape, in metres.
        pred: predicted depth, positive, of the same shape.
        valid_mask: bool, of the same shape; pixels with `gt` > 0 count where it is True. None: all pixels count.
        list_metrics: which ones, by name or as items of `DEPTH_METRICS`.

    Returns:
        All ten; NaN without valid pixels.

    Raises:
        ValueError: the shapes differ, or there is no such metric.
    """
    names = {metric if isinstance(metric, str) else metric.name for metric in list_metrics}
    for name in sorted(names.difference(DEPTH_METRICS_NAME)):
        raise ValueError(
            f"there is no depth metric {name!r}{did_you_mean(name, DEPTH_METRICS_NAME)}; expected some of "
            f"{', '.join(DEPTH_METRICS_NAME)}"
        )
    _check_shapes(gt, pred, valid_mask)
    if valid_mask is not None:
        valid = valid_mask.bool() & (gt > 0)
        gt, pred = gt[valid], pred[valid]  # [n]
    values = _all_metrics(gt.float(), pred.float())
    missing = torch.full((), torch.nan, device=gt.device)
    defaults = {"log_10": torch.full((), torch.inf, device=gt.device)}
    return DepthMetrics(**{n: values[n] if n in names else defaults.get(n, missing) for n in DEPTH_METRICS_NAME})


def _all_metrics(gt: Tensor, pred: Tensor) -> dict[str, Tensor]:
    error = gt - pred
    log_error = gt.log() - pred.log()
    ratio = torch.maximum(gt / pred, pred / gt)
    exact = log_error.to(_exact_dtype(log_error))
    return {
        "a1": (ratio < ACCURACY_FACTOR).float().mean(),
        "a2": (ratio < ACCURACY_FACTOR**2).float().mean(),
        "a3": (ratio < ACCURACY_FACTOR**3).float().mean(),
        "abs_rel": (error.abs() / gt).mean(),
        "rmse": error.square().mean().sqrt(),
        "log_10": (gt.log10() - pred.log10()).abs().mean(),
        "rmse_log": log_error.square().mean().sqrt(),
        "silog": (100 * (exact - exact.mean()).square().mean().sqrt()).float(),
        "sq_rel": (error.square() / gt).mean(),
        "mae": error.abs().mean(),
    }


def align_depth_least_square(
    gt: Tensor, pred: Tensor, valid_mask: Tensor, max_resolution: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The prediction with the scale and shift that bring it nearest to the measurement, in the sense of least squares.

    Args:
        gt: measured depth of one image, [..., H, W] with leading dimensions of 1.
        pred: predicted depth, of the same shape.
        valid_mask: bool, of the same shape: the pixels to fit. The result is applied to all.
        max_resolution: fit on maps reduced to this longer side, by nearest neighbour.

    Returns:
        (`scale * pred + shift` in the shape and dtype of `pred`, scale, shift), the last two float32 scalars. Many
        pairs fit a constant prediction: it gets the one nearest to 0. All are NaN without valid pixels.

    Raises:
        ValueError: the shapes differ, or there is more than one image.
    """
    _check_shapes(gt, pred, valid_mask)
    if gt.ndim < 2 or gt.shape[:-2].numel() != 1:
        raise ValueError(f"expected the maps of one image, [1, 1, H, W] or [H, W], got shape {tuple(gt.shape)}")
    dtype = _exact_dtype(pred)
    fit_gt, fit_pred, fit_mask = (_reduced(maps, max_resolution) for maps in (gt, pred, valid_mask))
    scale, shift = _fit(fit_gt[fit_mask > 0].to(dtype), fit_pred[fit_mask > 0].to(dtype))
    return (scale * pred.to(dtype) + shift).to(pred.dtype), scale.float(), shift.float()


def _fit(gt: Tensor, pred: Tensor) -> tuple[Tensor, Tensor]:
    gt_mean, pred_mean = gt.mean(), pred.mean()
    deviation = pred - pred_mean
    variance = deviation.square().mean()
    is_constant = variance <= (CONSTANT_TOLERANCE * pred_mean).square()
    scale = torch.where(is_constant, gt_mean * pred_mean / (pred_mean.square() + 1), (deviation * gt).mean() / variance)
    return scale, gt_mean - scale * pred_mean


def _reduced(maps: Tensor, max_resolution: int | None) -> Tensor:
    maps = maps.reshape(1, 1, *maps.shape[-2:])
    if max_resolution is None or max(maps.shape[-2:]) <= max_resolution:
        return maps
    # As floating point, which is all that interpolation takes; masks too.
    return F.interpolate(maps.float(), scale_factor=max_resolution / max(maps.shape[-2:]), mode="nearest")


def _exact_dtype(like: Tensor) -> torch.dtype:
    # Apple's GPUs have no float64.
    return torch.float32 if like.device.type == "mps" else torch.float64


def _check_shapes(gt: Tensor, pred: Tensor, valid_mask: Tensor | None) -> None:
    if gt.shape != pred.shape or (valid_mask is not None and valid_mask.shape != gt.shape):
        mask = "" if valid_mask is None else f", valid_mask {tuple(valid_mask.shape)}"
        raise ValueError(f"expected maps of one shape, got gt {tuple(gt.shape)}, pred {tuple(pred.shape)}{mask}")
