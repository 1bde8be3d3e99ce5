from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov3.loss import iBOTPatchLoss

from . import naive

MASKS = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)


def example(*leading: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(*leading, 6, generator=generator) * 0.3
    return student, torch.randn(*leading, 6, generator=generator).softmax(-1)


def naive_masked(student: Tensor, teacher: Tensor, weights: list[float], n_crops: int) -> Tensor:
    terms = [w * naive.cross_entropy(s, t, 0.1) for s, t, w in zip(student, teacher, weights, strict=True)]
    return torch.stack(terms).sum() / n_crops


def test_masked_patches_weigh_one_over_their_crops_count_and_unmasked_crops_count() -> None:
    student, teacher = example(4)
    loss = iBOTPatchLoss(6).forward_masked(student, teacher, student_masks_flat=MASKS)
    assert loss.shape == () and loss.dtype == torch.float32
    want = naive_masked(student, teacher, [1 / 3, 1 / 3, 1 / 3, 1], n_crops=3)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_gradient_with_given_weights_is_zero_in_the_padding() -> None:
    student, teacher = example(5)
    student.requires_grad_()
    weights = [0.5, 1.5, 0.25]
    iBOTPatchLoss(6).forward_masked(
        student, teacher, student_masks_flat=MASKS, n_masked_patches=3, masks_weight=torch.tensor(weights)
    ).backward()
    want = naive.finite_differences(lambda x: naive_masked(x[:3], teacher[:3], weights, 3), student.detach())
    assert student.grad is not None
    torch.testing.assert_close(student.grad.double(), want, atol=1e-5, rtol=1e-4)
    assert not student.grad[3:].any()


def test_dense_form_equals_the_masked_form() -> None:
    student, teacher = example(3, 4)
    loss = iBOTPatchLoss(6)
    want = loss.forward_masked(student[MASKS], teacher[MASKS], student_masks_flat=MASKS)
    torch.testing.assert_close(loss(student, teacher, MASKS), want)


def test_no_masked_patch_gives_zero_with_a_gradient() -> None:
    student = torch.zeros(0, 6, requires_grad=True)
    masks = torch.zeros(4, 9, dtype=torch.bool)
    loss = iBOTPatchLoss(6).forward_masked(student, torch.zeros(0, 6), student_masks_flat=masks, n_masked_patches=0)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None


def test_bfloat16_logits_are_computed_in_float32() -> None:
    student, teacher = example(4)
    student = student.bfloat16()
    loss = iBOTPatchLoss(6).forward_masked(student, teacher, student_masks_flat=MASKS)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive_masked(student, teacher, [1 / 3, 1 / 3, 1 / 3, 1], 3).item(), rel=1e-5)
