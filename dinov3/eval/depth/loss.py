"""Losses of predicted depth maps against measured ones, at the pixels that have a measurement.

All are called `(pred, gt, valid_mask=None)` with maps [B, 1, H, W] in metres. Pixels where the mask is False have no
effect, whatever they hold; without a mask all count. The whole batch is one set of pixels. A batch without valid pixels
costs 0 and gives gradients of 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import cast

import torch
from torch import Tensor, nn

from dinov3.utils.messages import did_you_mean

EPS = 1e-3
MEAN_WEIGHT = 0.15
GRADIENT_STRIDES = (1, 2, 4, 6)
L1_COUNT_EPS = 1e-7


class LossType(Enum):
    """The losses by the names that configurations use."""

    SIGLOSS = "sigloss"
    GRADIENT_LOSS = "gradient_loss"
    GRADIENT_LOG_LOSS = "gradient_log_loss"
    L1 = "l1"

    def module(self) -> DepthLoss:
        """Make a loss of this type, as trainings use it."""
        classes: dict[LossType, type[DepthLoss]] = {
            LossType.SIGLOSS: SigLoss,
            LossType.GRADIENT_LOSS: GradientLoss,
            LossType.GRADIENT_LOG_LOSS: GradientLogLoss,
            LossType.L1: L1Loss,
        }
        return classes[self]()


class DepthLoss(nn.Module):
    """Base of the losses of depth maps, which makes invalid pixels harmless.

    Attributes:
        n_calls: how often it was called; not in `state_dict`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.n_calls = 0

    def forward(self, pred: Tensor, gt: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            pred: predicted depth [B, 1, H, W], positive.
            gt: measured depth, of the same shape.
            valid_mask: bool, of the same shape. Default: all pixels are valid.

        Returns:
            A float32 scalar (float64 for float64 predictions).

        Raises:
            ValueError: the shapes differ.
        """
        mask = torch.ones_like(gt, dtype=torch.bool) if valid_mask is None else valid_mask.bool()
        if not pred.shape == gt.shape == mask.shape:
            raise ValueError(
                f"a depth loss needs maps of one shape, got pred {tuple(pred.shape)}, gt {tuple(gt.shape)}, valid_mask "
                f"{tuple(mask.shape)}"
            )
        self.n_calls += 1
        dtype = torch.promote_types(pred.dtype, torch.float32)
        # Values are replaced before any logarithm, because a gradient of 0 times one of infinity would be NaN. Pixels
        # are masked and not selected, because that would wait for the device.
        pred, gt = (depth.to(dtype).masked_fill(~mask, 1.0) for depth in (pred, gt))
        return self.masked_loss(pred, gt, mask)

    def masked_loss(self, pred: Tensor, gt: Tensor, mask: Tensor) -> Tensor:
        """Compute the loss of maps that are 1 where the mask is False."""
        raise NotImplementedError


class SigLoss(DepthLoss):
    """Scale-invariant loss: the root of the variance of the difference of logarithms plus 0.15 times its squared mean.

    Args:
        warm_up: leave out the variance in the first calls.
        warm_iter: the number of these calls, training or not.
    """

    def __init__(self, warm_up: bool = True, warm_iter: int = 100) -> None:
        super().__init__()
        self.eps = EPS
        self.warm_up = warm_up
        self.warm_iter = warm_iter

    def masked_loss(self, pred: Tensor, gt: Tensor, mask: Tensor) -> Tensor:
        difference = (pred + self.eps).log() - (gt + self.eps).log()
        n_pixels = mask.sum()
        mean = _masked_sum(difference, mask) / n_pixels.clamp(min=1)
        result = MEAN_WEIGHT * mean.square()
        if not (self.warm_up and self.n_calls <= self.warm_iter):
            squares = _masked_sum((difference - mean).square(), mask)
            result = result + squares / (n_pixels - 1).clamp(min=1)
        # The root has no gradient at 0, but `result` has one of 0 there.
        positive = result > 0
        return torch.where(positive, torch.where(positive, result, 1.0).sqrt(), result)


class GradientLoss(DepthLoss):
    """Mean difference of the gradients of depths, at four resolutions."""

    def masked_loss(self, pred: Tensor, gt: Tensor, mask: Tensor) -> Tensor:
        return _gradient_difference(pred - gt, mask)


class GradientLogLoss(DepthLoss):
    """Mean difference of the gradients of logarithms of depths, at four resolutions."""

    def masked_loss(self, pred: Tensor, gt: Tensor, mask: Tensor) -> Tensor:
        return _gradient_difference((pred + EPS).log() - (gt + EPS).log(), mask)


class L1Loss(DepthLoss):
    """Mean absolute difference."""

    def masked_loss(self, pred: Tensor, gt: Tensor, mask: Tensor) -> Tensor:
        return _masked_sum((pred - gt).abs(), mask) / (mask.sum() + L1_COUNT_EPS)


class MultiLoss(nn.Module):
    """A weighted sum of losses, without entries in its `state_dict`.

    Args:
        losses: weights by type or by its name.

    Attributes:
        dict_losses: the losses, by the names of their types.

    Raises:
        ValueError: there are no losses, or one is unknown.
    """

    def __init__(self, losses: Mapping[LossType, float] | Mapping[str, float]) -> None:
        super().__init__()
        if not losses:
            raise ValueError(f"losses is empty: give weights of {', '.join(LossType.__members__)}")
        self.weights = {loss if isinstance(loss, str) else loss.name: float(weight) for loss, weight in losses.items()}
        known = LossType.__members__
        for name in set(self.weights).difference(known):
            raise ValueError(f"unknown loss {name!r}{did_you_mean(name, known)}: expected some of {', '.join(known)}")
        self.dict_losses = nn.ModuleDict({name: LossType[name].module() for name in self.weights})

    def forward(self, pred: Tensor, gt: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """Compute the sum, a scalar; see `DepthLoss.forward`."""
        terms = [self.weights[name] * loss(pred, gt, valid_mask) for name, loss in self._named_losses()]
        return torch.stack(terms).sum()

    def loss_state(self) -> dict[str, int]:
        """Return how often each loss was called, by the name of its type; a checkpoint must hold it."""
        return {name: loss.n_calls for name, loss in self._named_losses()}

    def load_loss_state(self, state: Mapping[str, int]) -> None:
        """Continue to count from a `loss_state`.

        Raises:
            ValueError: the state belongs to other losses.
        """
        if set(state) != set(self.dict_losses):
            raise ValueError(
                f"the checkpoint belongs to a training with losses {', '.join(sorted(state)) or 'none'}, this training "
                f"has {', '.join(sorted(self.dict_losses))}: resume with the same losses"
            )
        for name, loss in self._named_losses():
            loss.n_calls = int(state[name])

    def _named_losses(self) -> list[tuple[str, DepthLoss]]:
        return cast("list[tuple[str, DepthLoss]]", list(self.dict_losses.items()))


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0).sum()


def _gradient_difference(difference: Tensor, mask: Tensor) -> Tensor:
    total = difference.new_zeros(())
    # Pixels two apart, on every first, second, fourth and sixth (not eighth) row and column: published heads were
    # trained that way.
    for stride in GRADIENT_STRIDES:
        part, valid = difference[..., ::stride, ::stride], mask[..., ::stride, ::stride]
        rows = (part[..., :-2, :] - part[..., 2:, :]).abs()
        columns = (part[..., :, :-2] - part[..., :, 2:]).abs()
        summed = _masked_sum(rows, valid[..., :-2, :] & valid[..., 2:, :])
        summed = summed + _masked_sum(columns, valid[..., :, :-2] & valid[..., :, 2:])
        total = total + summed / valid.sum().clamp(min=1)
    return total
