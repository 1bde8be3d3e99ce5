"""Losses of segmentation: cross entropy and Dice (V-Net, arXiv 1606.04797), of labels with ignored pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.eval.segmentation.metrics import IGNORE_INDEX
from dinov3.utils.messages import list_names

EPS = torch.finfo(torch.float32).eps
REDUCTIONS = ("none", "mean", "sum")


class CrossEntropyLoss(nn.Module):
    """Cross entropy of each pixel's class.

    Args:
        class_weight: multiplies the loss of pixels of each class, [K].
        loss_weight: multiplies the result.
        reduction: `"mean"` over all pixels, `"sum"`, or `"none"` for [B, H, W].
        ignore_index: label of pixels whose loss is 0.
        avg_non_ignore: take the mean over the pixels that are not ignored. As published the mean is over all, so crops
            with much ignored area weigh less; the published learning rates were tuned with that.
    """

    def __init__(
        self,
        class_weight: Sequence[float] | Tensor | None = None,
        loss_weight: float = 1.0,
        reduction: str = "mean",
        ignore_index: int = IGNORE_INDEX,
        avg_non_ignore: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r}: expected one of {', '.join(REDUCTIONS)}")
        self.class_weight = class_weight
        self.loss_weight = loss_weight
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.avg_non_ignore = avg_non_ignore

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """Compute the loss, in float32 at least.

        Args:
            pred: logits [B, K, H, W].
            label: classes [B, H, W], integers from 0 to K - 1, or `ignore_index`.

        Raises:
            ValueError: the shapes do not fit, or a label is not a class.
        """
        label = _check_labels(pred, label, self.ignore_index)
        losses = F.cross_entropy(
            _at_least_float32(pred),
            label,
            weight=_as_weight(self.class_weight, pred),
            reduction="none",
            ignore_index=self.ignore_index,
        )  # [B, H, W]
        if self.reduction == "mean" and self.avg_non_ignore:
            result = losses.sum() / ((label != self.ignore_index).sum() + EPS)
        else:
            result = losses if self.reduction == "none" else getattr(losses, self.reduction)()
        return self.loss_weight * result


class DiceLoss(nn.Module):
    """Dice loss of the softmax over classes: the sum of `binary_dice_loss` of each class, divided by K.

    Args:
        smooth: see `binary_dice_loss`.
        exponent: see `binary_dice_loss`.
        class_weight: multiplies the loss of each class, [K].
        loss_weight: multiplies the result.
        ignore_index: label of pixels that no overlap counts; if it is a class, that class is left out of the sum.
    """

    def __init__(
        self,
        smooth: float = 1,
        exponent: float = 2,
        class_weight: Sequence[float] | Tensor | None = None,
        loss_weight: float = 1.0,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        self.smooth = smooth
        self.exponent = exponent
        self.class_weight = class_weight
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """Compute the mean loss of the images, in float32 at least.

        Args:
            pred: logits [B, K, H, W].
            label: classes [B, H, W], integers from 0 to K - 1, or `ignore_index`, or 255.

        Raises:
            ValueError: the shapes do not fit, or a label is not a class.
        """
        n_classes = pred.shape[1]
        label = _check_labels(pred, label, self.ignore_index, IGNORE_INDEX)[:, None]  # [B, 1, H, W]
        probabilities = _at_least_float32(pred).softmax(dim=1)
        # As published, only the overlap ignores pixels: in the denominator they count as pixels of the last class.
        one_hot = torch.zeros_like(probabilities).scatter_(1, label.clamp(0, n_classes - 1), 1)
        is_counted = torch.arange(n_classes, device=pred.device) != self.ignore_index
        return self._sum_classes(probabilities, one_hot, label != self.ignore_index, is_counted)

    def _sum_classes(
        self, probabilities: Tensor, target: Tensor, valid: Tensor, is_counted: Tensor | float = 1.0
    ) -> Tensor:
        probabilities, target, valid = (tensor.flatten(2) for tensor in (probabilities, target, valid))
        losses = _dice(probabilities, target, valid, self.smooth, self.exponent) * is_counted  # [B, K]
        weight = _as_weight(self.class_weight, probabilities)
        losses = losses if weight is None else losses * weight
        return self.loss_weight * (losses.sum(dim=1) / losses.shape[1]).mean()


class MultilabelDiceLoss(DiceLoss):
    """Dice loss of the sigmoid of each class, for pixels of any number of classes; nothing is ignored."""

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """Compute the loss of logits [B, K, H, W] for targets of 0 and 1 of the same shape.

        Raises:
            ValueError: the shapes differ.
        """
        if pred.shape != label.shape:
            raise ValueError(f"multilabel targets of shape {list(label.shape)} for logits of shape {list(pred.shape)}")
        probabilities = _at_least_float32(pred).sigmoid()
        return self._sum_classes(probabilities, label, torch.ones_like(probabilities))


class MultiSegmentationLoss(nn.Module):
    """A weighted sum of Dice loss and cross entropy.

    Args:
        diceloss_weight: of `DiceLoss`, or for targets [B, K, H, W] of `MultilabelDiceLoss`.
        celoss_weight: of `CrossEntropyLoss`, which takes class labels [B, H, W] only.

    Raises:
        ValueError: a weight is negative, or both are 0.
    """

    def __init__(self, diceloss_weight: float = 0.0, celoss_weight: float = 0.0) -> None:
        super().__init__()
        if min(diceloss_weight, celoss_weight) < 0 or diceloss_weight + celoss_weight == 0:
            raise ValueError(
                f"diceloss_weight={diceloss_weight} and celoss_weight={celoss_weight}: expected weights of at least 0, "
                "one of them above"
            )
        self.diceloss_weight = diceloss_weight
        self.celoss_weight = celoss_weight
        self.dice = DiceLoss(loss_weight=diceloss_weight)
        self.multilabel_dice = MultilabelDiceLoss(loss_weight=diceloss_weight)
        self.cross_entropy = CrossEntropyLoss(loss_weight=celoss_weight)

    def forward(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Compute the loss, a scalar.

        Args:
            pred: logits [B, K, H, W].
            gt: classes [B, H, W], or 0 and 1 of the shape of `pred`.

        Raises:
            ValueError: the shapes do not fit, a label is not a class, or `celoss_weight` is given for multilabel
                targets.
        """
        if gt.ndim == pred.ndim:
            if self.celoss_weight > 0:
                raise ValueError(
                    f"celoss_weight={self.celoss_weight}: cross entropy takes class labels [B, H, W], got targets of "
                    f"shape {list(gt.shape)}"
                )
            return self.multilabel_dice(pred, gt)
        losses = [self.dice(pred, gt)] if self.diceloss_weight > 0 else []
        if self.celoss_weight > 0:
            losses.append(self.cross_entropy(pred, gt))
        return torch.stack(losses).sum()


def binary_dice_loss(
    pred: Tensor,
    target: Tensor,
    valid_mask: Tensor,
    smooth: float = 1,
    exponent: float = 2,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Compute 1 - (2 sum(p t m) + smooth) / (sum(p^exponent + t^exponent) + smooth) of each sample.

    Args:
        pred: probabilities p [B, ...].
        target: t, 0 or 1, of the same shape.
        valid_mask: m, 0 or 1, of the same shape.
        smooth: keeps samples without target finite.
        exponent: of the denominator.
        reduction: `"mean"` over the samples, or `"none"`.

    Returns:
        A scalar, or [B] with `"none"`.
    """
    losses = _dice(pred.flatten(1), target.flatten(1), valid_mask.flatten(1), smooth, exponent)
    return losses if reduction == "none" else losses.mean()


def _dice(probabilities: Tensor, target: Tensor, valid: Tensor, smooth: float, exponent: float) -> Tensor:
    # Sums over the last dimension.
    target = target.to(probabilities)
    overlap = (probabilities * target * valid).sum(dim=-1)
    total = (probabilities**exponent + target**exponent).sum(dim=-1)
    return 1 - (2 * overlap + smooth) / (total + smooth)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _as_weight(class_weight: Sequence[float] | Tensor | None, pred: Tensor) -> Tensor | None:
    if class_weight is None:
        return None
    weight = torch.as_tensor(class_weight, device=pred.device, dtype=_at_least_float32(pred[:0]).dtype)
    if weight.shape != pred.shape[1:2]:
        raise ValueError(f"class_weight of shape {list(weight.shape)} for {pred.shape[1]} classes")
    return weight


def _check_labels(pred: Tensor, label: Tensor, ignore_index: int, *also_ignored: int) -> Tensor:
    n_classes = pred.shape[1]
    if pred.ndim != label.ndim + 1 or len(pred) != len(label) or pred.shape[2:] != label.shape[1:]:
        raise ValueError(
            f"labels of shape {list(label.shape)} for logits of shape {list(pred.shape)}: expected "
            f"{[len(pred), *pred.shape[2:]]}"
        )
    label = label.long()
    is_unknown = (label < 0) | (label >= n_classes)
    for index in (ignore_index, *also_ignored):
        is_unknown &= label != index
    # This waits for the device once, but a label out of range would end a CUDA process with an assertion that names
    # nothing.
    if is_unknown.any():
        raise ValueError(
            f"labels {list_names(label[is_unknown].unique().tolist())} for {n_classes} classes: expected 0 to "
            f"{n_classes - 1}, or {ignore_index} where a pixel is ignored"
        )
    return label
