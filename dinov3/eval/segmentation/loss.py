"""Losses of segmentation: cross entropy and Dice (V-Net, arXiv 1606.04797), of labels with ignored pixels.

Notable:
- Cross entropy is the mean over all pixels, ignored ones included, so crops with much ignored area weigh less. The
  published learning rates were tuned with it; `avg_non_ignore` is the other way.
- The Dice loss of class labels ignores pixels in the overlap alone: in the denominator an ignored pixel counts as one
  of the last class. As published.
- All is computed in float32 at least. An image of ignored pixels alone gives finite losses and gradients.
- Labels are checked in each call, which waits for their device once: a label out of range would otherwise end a CUDA
  process with an assertion that names nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = torch.finfo(torch.float32).eps
UNLABELLED = 255

#: Weights of the K classes: their values, or a NumPy file with them.
ClassWeight = Sequence[float] | Tensor | str | os.PathLike[str] | None


def get_class_weight(class_weight: ClassWeight) -> Tensor | None:
    """Weights of classes as float32 [K].

    Args:
        class_weight: values, a file that `numpy.load` reads, or None.
    """
    if class_weight is None:
        return None
    if isinstance(class_weight, str | os.PathLike):
        class_weight = torch.from_numpy(np.load(class_weight))
    return torch.as_tensor(class_weight, dtype=torch.float32)


def reduce_loss(loss: Tensor, reduction: str) -> Tensor:
    """`loss` itself (`"none"`), its `"mean"` or its `"sum"`.

    Raises:
        ValueError: another reduction.
    """
    if reduction == "none":
        return loss
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: expected 'none', 'mean' or 'sum'")
    return loss.mean() if reduction == "mean" else loss.sum()


def weight_reduce_loss(
    loss: Tensor, weight: Tensor | None = None, reduction: str = "mean", avg_factor: float | Tensor | None = None
) -> Tensor:
    """`reduce_loss` of a weighted loss.

    Args:
        loss: of any shape.
        weight: multiplies it, broadcast; None: 1.
        reduction: `"none"`, `"mean"` or `"sum"`.
        avg_factor: what the mean divides the sum by, instead of the number of elements; plus float32's epsilon.

    Raises:
        ValueError: another reduction, or `avg_factor` with `"sum"`.
    """
    if weight is not None:
        loss = loss * weight
    if avg_factor is None or reduction == "none":
        return reduce_loss(loss, reduction)
    if reduction != "mean":
        raise ValueError(f"avg_factor={avg_factor} divides a mean, but reduction={reduction!r}")
    return loss.sum() / (avg_factor + EPS)


def binary_dice_loss(
    pred: Tensor,
    target: Tensor,
    valid_mask: Tensor,
    smooth: float = 1,
    exponent: float = 2,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    """1 - (2 sum(p t m) + smooth) / (sum(p^exponent + t^exponent) + smooth) of each sample.

    Args:
        pred: probabilities p [B, ...].
        target: t, 0 or 1, of the same shape.
        valid_mask: m, 0 or 1, of the same shape.
        smooth: keeps empty samples finite.
        exponent: of the denominator.
        weight: of each sample, [B].
        reduction: over the samples: `"mean"`, `"sum"` or `"none"`.
        avg_factor: as of `weight_reduce_loss`.

    Returns:
        A scalar, or [B] with `"none"`.
    """
    losses = _dice(pred.flatten(1), target.flatten(1), valid_mask.flatten(1), smooth, exponent)
    return weight_reduce_loss(losses, weight, reduction, avg_factor)


class CrossEntropyLoss(nn.Module):
    """Cross entropy of each pixel's class.

    Args:
        weight: multiplies the loss of pixels, broadcast to [B, H, W].
        class_weight: multiplies the loss of pixels of each class; see `get_class_weight`.
        loss_weight: multiplies the result.
        reduction: `"mean"` over all pixels, `"sum"`, or `"none"` for [B, H, W].
        avg_factor: of published configurations, without effect.
        ignore_index: label of pixels whose loss is 0.
        avg_non_ignore: take the mean over pixels that are not ignored.
    """

    weight: Tensor | None
    class_weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        class_weight: ClassWeight = None,
        loss_weight: float = 1.0,
        reduction: str = "mean",
        avg_factor: float | None = None,
        ignore_index: int = UNLABELLED,
        avg_non_ignore: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("class_weight", get_class_weight(class_weight), persistent=False)
        self.loss_weight = loss_weight
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.avg_non_ignore = avg_non_ignore

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """The loss.

        Args:
            pred: logits [B, K, H, W].
            label: classes [B, H, W], integers from 0 to K - 1, or `ignore_index`.

        Raises:
            ValueError: shapes do not fit, or a label is no class.
        """
        label = _checked_labels(pred, label, (self.ignore_index,))
        _check_class_weight(self.class_weight, pred)
        logits = _at_least_float32(pred)
        class_weight = None if self.class_weight is None else self.class_weight.to(logits)
        losses = F.cross_entropy(
            logits, label, weight=class_weight, reduction="none", ignore_index=self.ignore_index
        )  # [B, H, W]
        n_valid = (label != self.ignore_index).sum() if self.avg_non_ignore and self.reduction == "mean" else None
        weight = None if self.weight is None else self.weight.to(losses)
        return self.loss_weight * weight_reduce_loss(losses, weight, self.reduction, n_valid)


class DiceLoss(nn.Module):
    """Dice loss of the softmax over classes: the sum of `binary_dice_loss` of each class, divided by K.

    Args:
        smooth: as of `binary_dice_loss`.
        exponent: as of `binary_dice_loss`.
        reduction: over the images: `"mean"`, `"sum"`, or `"none"` for [B].
        class_weight: multiplies the loss of each class; see `get_class_weight`.
        loss_weight: multiplies the result.
        ignore_index: label of pixels that no overlap counts; if it is a class, that class is left out of the sum.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        smooth: float = 1,
        exponent: float = 2,
        reduction: str = "mean",
        class_weight: ClassWeight = None,
        loss_weight: float = 1.0,
        ignore_index: int = UNLABELLED,
    ) -> None:
        super().__init__()
        self.register_buffer("class_weight", get_class_weight(class_weight), persistent=False)
        self.smooth = smooth
        self.exponent = exponent
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """The loss.

        Args:
            pred: logits [B, K, H, W].
            label: classes [B, H, W], integers from 0 to K - 1, or `ignore_index`, or 255.

        Raises:
            ValueError: shapes do not fit, or a label is no class.
        """
        label = _checked_labels(pred, label, (self.ignore_index, UNLABELLED))[:, None]  # [B, 1, H, W]
        probabilities = _at_least_float32(pred).softmax(dim=1)
        one_hot = torch.zeros_like(probabilities).scatter_(1, label.clamp(0, pred.shape[1] - 1), 1)  # [B, K, H, W]
        valid = label != self.ignore_index
        return self._reduce(probabilities, one_hot, valid, skipped=self.ignore_index)

    def _reduce(self, probabilities: Tensor, target: Tensor, valid: Tensor, skipped: int | None) -> Tensor:
        n_classes = probabilities.shape[1]
        _check_class_weight(self.class_weight, probabilities)
        losses = _dice(
            probabilities.flatten(2), target.flatten(2), valid.flatten(2), self.smooth, self.exponent
        )  # [B, K]
        if self.class_weight is not None:
            losses = losses * self.class_weight.to(losses)
        counted = torch.arange(n_classes, device=losses.device) != (-1 if skipped is None else skipped)
        return self.loss_weight * reduce_loss((losses * counted).sum(dim=1) / n_classes, self.reduction)


class MultilabelDiceLoss(DiceLoss):
    """Dice loss of the sigmoid of each class, for pixels of any number of classes; arguments as of `DiceLoss`.

    Nothing is ignored: `ignore_index` has no effect.
    """

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """The loss of logits [B, K, H, W], for targets of 0 and 1 of that shape.

        Raises:
            ValueError: the shapes differ.
        """
        if pred.shape != label.shape:
            raise ValueError(f"multilabel targets of shape {list(label.shape)} for logits of shape {list(pred.shape)}")
        probabilities = _at_least_float32(pred).sigmoid()
        valid = torch.ones_like(probabilities[:, :1])
        return self._reduce(probabilities, label.to(probabilities), valid, skipped=None)


class MultiSegmentationLoss(nn.Module):
    """A weighted sum of Dice loss and cross entropy.

    Args:
        diceloss_weight: of `DiceLoss`, or for targets [B, K, H, W] of `MultilabelDiceLoss`.
        celoss_weight: of `CrossEntropyLoss`, which takes class labels [B, H, W] only.
        ignore_index: label of ignored pixels.

    Raises:
        ValueError: a weight is negative, or both are 0.
    """

    def __init__(
        self, diceloss_weight: float = 0.0, celoss_weight: float = 0.0, *, ignore_index: int = UNLABELLED
    ) -> None:
        super().__init__()
        if min(diceloss_weight, celoss_weight) < 0 or diceloss_weight + celoss_weight == 0:
            raise ValueError(
                f"diceloss_weight={diceloss_weight} and celoss_weight={celoss_weight}: expected weights of at least 0, "
                "one of them above"
            )
        self.diceloss_weight = diceloss_weight
        self.celoss_weight = celoss_weight
        self.dice = DiceLoss(loss_weight=diceloss_weight, ignore_index=ignore_index)
        self.multilabel_dice = MultilabelDiceLoss(loss_weight=diceloss_weight)
        self.cross_entropy = CrossEntropyLoss(loss_weight=celoss_weight, ignore_index=ignore_index)

    def forward(self, pred: Tensor, gt: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            pred: logits [B, K, H, W].
            gt: classes [B, H, W], or 0 and 1 of the shape of `pred`.

        Raises:
            ValueError: shapes do not fit, a label is no class, or cross entropy of multilabel targets is asked for.
        """
        if gt.ndim == pred.ndim:
            if self.celoss_weight > 0:
                raise ValueError(
                    f"celoss_weight={self.celoss_weight}: cross entropy takes class labels [B, H, W], got targets of "
                    f"shape {list(gt.shape)}"
                )
            return self.multilabel_dice(pred, gt)
        losses: list[Any] = [self.dice(pred, gt)] if self.diceloss_weight > 0 else []
        if self.celoss_weight > 0:
            losses.append(self.cross_entropy(pred, gt))
        return torch.stack(losses).sum()


def _dice(probabilities: Tensor, target: Tensor, valid: Tensor, smooth: float, exponent: float) -> Tensor:
    # Sums over the last dimension.
    target = target.to(probabilities)
    overlap = (probabilities * target * valid).sum(dim=-1)
    total = (probabilities**exponent + target**exponent).sum(dim=-1)
    return 1 - (2 * overlap + smooth) / (total + smooth)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _checked_labels(pred: Tensor, label: Tensor, allowed: Sequence[int]) -> Tensor:
    n_classes = pred.shape[1]
    if pred.ndim != label.ndim + 1 or len(pred) != len(label) or pred.shape[2:] != label.shape[1:]:
        raise ValueError(
            f"labels of shape {list(label.shape)} for logits of shape {list(pred.shape)}: expected "
            f"{[len(pred), *pred.shape[2:]]}"
        )
    label = label.long()
    out_of_range = (label < 0) | (label >= n_classes)
    for index in allowed:
        out_of_range &= label != index
    if out_of_range.any():
        ids = label[out_of_range].unique().tolist()
        listed = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
        raise ValueError(
            f"labels {listed} for {n_classes} classes: expected 0 to {n_classes - 1}, or {allowed[0]} where a pixel is "
            "ignored"
        )
    return label


def _check_class_weight(class_weight: Tensor | None, pred: Tensor) -> None:
    if class_weight is not None and class_weight.shape != pred.shape[1:2]:
        raise ValueError(f"class_weight of shape {list(class_weight.shape)} for {pred.shape[1]} classes")
