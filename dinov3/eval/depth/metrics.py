"""Errors of a predicted depth map, the pixels that count, and the scale and shift that fit a prediction best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.utils.messages import did_you_mean

ACCURACY_FACTOR = 1.25
#: Predictions whose standard deviation is below this share of their mean are constant: no scale fits them.
CONSTANT_TOLERANCE = 1e-7
#: Rows 45..471 and columns 41..601 (half open) of 480 x 640, as shares of height and width.
NYU_EIGEN_ROWS = (45 / 480, 471 / 480)
NYU_EIGEN_COLUMNS = (41 / 640, 601 / 640)


class EvalCropType(Enum):
    """The part of a map that counts."""

    #: The part of NYU's 480 x 640 images that most publications evaluate: without the border.
    NYU_EIGEN = "NYU_EIGEN"
    FULL = "FULL"


def make_valid_mask(x: Tensor, eval_crop: EvalCropType | str = EvalCropType.FULL, ignored_value: float = 0.0) -> Tensor:
    """Find the pixels of depth maps that hold a measurement that counts.

    Args:
        x: depth [B, C, H, W].
        eval_crop: the part that counts, or its name.
        ignored_value: means "not measured" if all channels of a pixel hold it.

    Returns:
        bool [B, C, H, W], the same for all channels. Pixels with a NaN or an infinity do not count either.

    Raises:
        ValueError: the crop is unknown, or `x` has other dimensions.
    """
    if x.ndim != 4:
        raise ValueError(f"expected depth maps [B, C, H, W], got shape {tuple(x.shape)}")
    names = EvalCropType.__members__
    if isinstance(eval_crop, str) and eval_crop not in names:
        raise ValueError(f"unknown evaluation crop {eval_crop!r}: expected one of {', '.join(names)}")
    height, width = x.shape[-2:]
    measured = (x != ignored_value).any(dim=1, keepdim=True) & x.isfinite().all(dim=1, keepdim=True)  # [B, 1, H, W]
    if eval_crop in (EvalCropType.NYU_EIGEN, "NYU_EIGEN"):
        inside = torch.zeros_like(measured)
        rows = slice(*(int(share * height) for share in NYU_EIGEN_ROWS))
        columns = slice(*(int(share * width) for share in NYU_EIGEN_COLUMNS))
        inside[..., rows, columns] = True
        measured = measured & inside
    return measured.expand_as(x).clone()


@dataclass(frozen=True)
class DepthMetric:
    """The name of a metric, and whether lower values are better."""

    name: str
    is_lower_better: bool = True


class DepthMetrics(NamedTuple):
    """Metrics of one set of pixels: float32 scalars on the device of the maps; those not requested are NaN."""

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
    """Compute errors over the valid pixels of all maps together.

    Args:
        gt: measured depth, of any shape, in metres.
        pred: predicted depth, positive, of the same shape.
        valid_mask: bool, of the same shape; pixels with `gt` > 0 count where it is True. Default: all pixels count.
        list_metrics: the requested ones, by name or as items of `DEPTH_METRICS`.

    Returns:
        All ten, NaN if there are no valid pixels, so that means over images can leave the image out.

    Raises:
        ValueError: the shapes differ, or a metric is unknown.
    """
    names = {metric if isinstance(metric, str) else metric.name for metric in list_metrics}
    for name in sorted(names.difference(DEPTH_METRICS_NAME)):
        raise ValueError(
            f"unknown depth metric {name!r}{did_you_mean(name, DEPTH_METRICS_NAME)}: expected some of "
            f"{', '.join(DEPTH_METRICS_NAME)}"
        )
    _check_shapes(gt, pred, valid_mask)
    if valid_mask is not None:
        valid = valid_mask.bool() & (gt > 0)
        gt, pred = gt[valid], pred[valid]  # [n]
    gt, pred = gt.float(), pred.float()
    error, log_error = gt - pred, gt.log() - pred.log()
    ratio = torch.maximum(gt / pred, pred / gt)
    exact = log_error.to(_exact_dtype(log_error))
    values = {
        "a1": (ratio < ACCURACY_FACTOR).float().mean(),
        "a2": (ratio < ACCURACY_FACTOR**2).float().mean(),
        "a3": (ratio < ACCURACY_FACTOR**3).float().mean(),
        "abs_rel": (error.abs() / gt).mean(),
        "rmse": error.square().mean().sqrt(),
        "log_10": (gt.log10() - pred.log10()).abs().mean(),
        "rmse_log": log_error.square().mean().sqrt(),
        # From deviations: the usual difference of two means can be negative by rounding.
        "silog": (100 * (exact - exact.mean()).square().mean().sqrt()).float(),
        "sq_rel": (error.square() / gt).mean(),
        "mae": error.abs().mean(),
    }
    # As published, log_10 is infinite if it was not requested.
    missing = {"log_10": torch.inf}
    not_requested = {name: gt.new_full((), missing.get(name, torch.nan)) for name in values.keys() - names}
    return DepthMetrics(**(values | not_requested))


def align_depth_least_square(
    gt: Tensor, pred: Tensor, valid_mask: Tensor, max_resolution: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and shift a prediction to the least-squares fit to the measurement.

    Args:
        gt: measured depth of one image, [..., H, W] with leading dimensions of 1.
        pred: predicted depth, of the same shape.
        valid_mask: bool, of the same shape: the pixels to fit; scale and shift are applied to all.
        max_resolution: fit on maps reduced to this longer side, by nearest neighbour.

    Returns:
        (`scale * pred + shift` in the shape and dtype of `pred`, scale, shift), the last two float32 scalars; all are
        NaN if there are no valid pixels.

    Raises:
        ValueError: the shapes differ, or there is more than one image.
    """
    _check_shapes(gt, pred, valid_mask)
    if gt.ndim < 2 or gt.shape[:-2].numel() != 1:
        raise ValueError(f"expected the maps of one image, [1, 1, H, W] or [H, W], got shape {tuple(gt.shape)}")
    dtype = _exact_dtype(pred)
    to_fit = [gt, pred, valid_mask]
    if max_resolution is not None and max(gt.shape[-2:]) > max_resolution:
        factor = max_resolution / max(gt.shape[-2:])
        # Interpolation takes [N, C, H, W], floating point only, so masks become such.
        to_fit = [maps.reshape(1, 1, *maps.shape[-2:]).float() for maps in to_fit]
        to_fit = [F.interpolate(maps, scale_factor=factor, mode="nearest") for maps in to_fit]
    fit_gt, fit_pred = (maps[to_fit[2] > 0].to(dtype) for maps in to_fit[:2])
    gt_mean, pred_mean = fit_gt.mean(), fit_pred.mean()
    deviation = fit_pred - pred_mean
    variance = deviation.square().mean()
    # Many pairs fit a constant prediction: take the one nearest to 0.
    is_constant = variance <= (CONSTANT_TOLERANCE * pred_mean).square()
    nearest = gt_mean * pred_mean / (pred_mean.square() + 1)
    scale = torch.where(is_constant, nearest, (deviation * fit_gt).mean() / variance)
    shift = gt_mean - scale * pred_mean
    return (scale * pred.to(dtype) + shift).to(pred.dtype), scale.float(), shift.float()


def _exact_dtype(values: Tensor) -> torch.dtype:
    # Apple's GPUs have no float64.
    return torch.float32 if values.device.type == "mps" else torch.float64


def _check_shapes(gt: Tensor, pred: Tensor, valid_mask: Tensor | None) -> None:
    if gt.shape != pred.shape or (valid_mask is not None and valid_mask.shape != gt.shape):
        mask = "" if valid_mask is None else f", valid_mask {tuple(valid_mask.shape)}"
        raise ValueError(f"expected maps of one shape, got gt {tuple(gt.shape)}, pred {tuple(pred.shape)}{mask}")
