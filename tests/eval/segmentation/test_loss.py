from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.eval.segmentation.loss import (
    CrossEntropyLoss,
    DiceLoss,
    MultilabelDiceLoss,
    MultiSegmentationLoss,
    binary_dice_loss,
)

K = 4


def logits_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, K, shape, generator=torch.Generator().manual_seed(seed))


def test_ignored_pixels_count_in_the_mean_by_default() -> None:
    pred, label = logits_of(2, K, 4, 5), labels_of(2, 4, 5)
    label[0] = 255
    valid_mean = F.cross_entropy(pred, label, ignore_index=255)
    torch.testing.assert_close(CrossEntropyLoss()(pred, label), valid_mean / 2)
    torch.testing.assert_close(CrossEntropyLoss(avg_non_ignore=True)(pred, label), valid_mean)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_classes_multiply(reduction: str) -> None:
    pred, label = logits_of(2, K, 4, 5), labels_of(2, 4, 5)
    classes = torch.tensor([1.0, 2.0, 0.5, 3.0])
    loss = CrossEntropyLoss(class_weight=classes.tolist(), loss_weight=2.0, reduction=reduction)
    want = 2 * F.cross_entropy(pred, label, reduction="none") * classes[label]
    torch.testing.assert_close(loss(pred, label), want if reduction == "none" else getattr(want, reduction)())
    assert loss.state_dict() == {}
    for wrong in (CrossEntropyLoss(class_weight=classes[:3]), DiceLoss(class_weight=classes[:3])):
        with pytest.raises(ValueError, match=r"class_weight of shape \[3\] for 4 classes"):
            wrong(pred, label)


def test_only_known_reductions_are_taken() -> None:
    pred, label = logits_of(2, K, 4, 5), labels_of(2, 4, 5)
    label[0] = 255
    assert CrossEntropyLoss(reduction="sum", avg_non_ignore=True)(pred, label) == CrossEntropyLoss(reduction="sum")(
        pred, label
    )
    with pytest.raises(ValueError, match="reduction='average': expected one of none, mean, sum"):
        CrossEntropyLoss(reduction="average")


def test_losses_are_computed_in_float32() -> None:
    pred, label = logits_of(2, K, 4, 5).bfloat16(), labels_of(2, 4, 5)
    for loss in (CrossEntropyLoss(), DiceLoss(), MultiSegmentationLoss(1.0, 1.0)):
        value = loss(pred, label)
        assert value.dtype == torch.float32 and torch.equal(value, loss(pred.float(), label))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integers_are_taken(dtype: torch.dtype) -> None:
    pred, label = logits_of(2, K, 4, 5), labels_of(2, 4, 5)
    label[0, 0] = 255
    for loss in (CrossEntropyLoss(), DiceLoss()):
        assert loss(pred, label.to(dtype)) == loss(pred, label)


def test_more_classes_than_bytes_count() -> None:
    pred, label = logits_of(1, 300, 2, 2), torch.tensor([[[0, 7], [200, 255]]], dtype=torch.uint8)
    assert CrossEntropyLoss()(pred, label) > 0


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropyLoss(),
        CrossEntropyLoss(avg_non_ignore=True),
        DiceLoss(),
        DiceLoss(smooth=1e-3),
        MultiSegmentationLoss(0.5, 0.5),
    ],
)
def test_ignored_pixels_alone_give_finite_values_and_gradients(loss: nn.Module) -> None:
    pred = logits_of(2, K, 4, 5).requires_grad_()
    value = loss(pred, torch.full((2, 4, 5), 255))
    value.backward()
    assert value.isfinite() and pred.grad is not None and pred.grad.isfinite().all()


@pytest.mark.parametrize("loss", [CrossEntropyLoss(), DiceLoss(), MultiSegmentationLoss(celoss_weight=1.0)])
@pytest.mark.parametrize(("wrong", "message"), [([K], f"labels {K} for {K}"), ([-1, 150], "labels -1, 150 for 4")])
def test_labels_that_are_no_class_are_refused(loss: nn.Module, wrong: list[int], message: str) -> None:
    label = labels_of(2, 4, 5)
    label[0, 0, : len(wrong)] = torch.tensor(wrong)
    with pytest.raises(ValueError, match=f"{message}.*expected 0 to 3, or 255"):
        loss(logits_of(2, K, 4, 5), label)


@pytest.mark.parametrize("loss", [CrossEntropyLoss(), DiceLoss()])
def test_shapes_that_do_not_fit_are_refused(loss: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"labels of shape \[4, 5\] for logits of shape \[1, 4, 4, 5\]"):
        loss(logits_of(1, K, 4, 5), labels_of(4, 5))
    with pytest.raises(ValueError, match=r"expected \[1, 4, 5\]"):
        loss(logits_of(1, K, 4, 5), labels_of(1, 4, 6))


def reference_dice(pred: Tensor, label: Tensor, *, ignore_index: int, smooth: float, exponent: float) -> Tensor:
    # [B], class by class.
    probabilities, total = pred.softmax(dim=1), torch.zeros(len(pred))
    for k in range(K):
        if k == ignore_index:
            continue
        target = (label.clamp(0, K - 1) == k).float()
        mask = (label != ignore_index).float()
        total += binary_dice_loss(probabilities[:, k], target, mask, smooth, exponent, reduction="none")
    return total / K


@pytest.mark.parametrize("ignore_index", [255, 2])
def test_dice_is_the_sum_over_classes_by_their_number(ignore_index: int) -> None:
    pred, label = logits_of(3, K, 4, 5), labels_of(3, 4, 5)
    label[0, 0] = 255
    want = reference_dice(pred, label, ignore_index=ignore_index, smooth=0.5, exponent=3)
    loss = DiceLoss(smooth=0.5, exponent=3, ignore_index=ignore_index)
    torch.testing.assert_close(loss(pred, label), want.mean())


def test_dice_of_a_perfect_prediction_is_near_zero() -> None:
    label = labels_of(1, 8, 8)
    pred = 50 * F.one_hot(label, K).movedim(-1, 1).float()
    assert DiceLoss()(pred, label) < 1e-6


def test_multilabel_dice_ignores_nothing() -> None:
    pred, target = logits_of(2, K, 4, 5), (logits_of(2, K, 4, 5, seed=5) > 0).float()
    per_class = [binary_dice_loss(pred.sigmoid()[:, k], target[:, k], torch.ones(2, 4, 5)) for k in range(K)]
    want = torch.stack(per_class).sum() / K
    torch.testing.assert_close(MultilabelDiceLoss()(pred, target), want)
    torch.testing.assert_close(MultilabelDiceLoss(ignore_index=2)(pred, target), want)
    with pytest.raises(ValueError, match=r"targets of shape \[2, 1, 4, 5\] for logits of shape \[2, 4, 4, 5\]"):
        MultilabelDiceLoss()(pred, target[:, :1])


def test_dice_and_cross_entropy_are_summed_by_their_weights() -> None:
    pred, label = logits_of(2, K, 4, 5).requires_grad_(), labels_of(2, 4, 5)
    label[0, 0] = 255
    got = MultiSegmentationLoss(diceloss_weight=0.3, celoss_weight=0.6)(pred, label)
    torch.testing.assert_close(got, 0.3 * DiceLoss()(pred, label) + 0.6 * CrossEntropyLoss()(pred, label))
    got.backward()
    assert pred.grad is not None and pred.grad.abs().sum() > 0
    torch.testing.assert_close(MultiSegmentationLoss(0.3)(pred, label), 0.3 * DiceLoss()(pred, label))


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, 2.0), (1.0, -0.5)])
def test_weights_that_give_no_loss_are_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=f"diceloss_weight={weights[0]} and celoss_weight={weights[1]}"):
        MultiSegmentationLoss(*weights)


def test_cross_entropy_of_multilabel_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="celoss_weight=0.5: cross entropy takes class labels"):
        MultiSegmentationLoss(1.0, 0.5)(logits_of(1, K, 2, 2), torch.zeros(1, K, 2, 2))
