from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dinov3.loss import DINOLoss

from . import naive


def example(n_student: int, n_teacher: int, n_prototypes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(n_student, 3, n_prototypes, generator=generator) * 0.3
    teacher = torch.randn(n_teacher, 3, n_prototypes, generator=generator).softmax(-1)
    return student, teacher


def naive_loss(student: Tensor, teacher: Tensor, temperature: float, ignore_diagonal: bool) -> Tensor:
    pairs = [
        p for p in itertools.product(range(len(student)), range(len(teacher))) if not ignore_diagonal or p[0] != p[1]
    ]
    terms = [naive.cross_entropy(student[s, b], teacher[t, b], temperature) for s, t in pairs for b in range(3)]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("ignore_diagonal", [False, True])
@pytest.mark.parametrize("n_student, n_teacher", [(2, 2), (5, 2), (1, 3)])
def test_is_the_mean_over_pairs_and_images(n_student: int, n_teacher: int, ignore_diagonal: bool) -> None:
    student, teacher = example(n_student, n_teacher)
    loss = DINOLoss(7, student_temp=0.2)(student, teacher, ignore_diagonal=ignore_diagonal)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive_loss(student, teacher, 0.2, ignore_diagonal).item(), rel=1e-5)


def test_gradient() -> None:
    student, teacher = example(2, 2)
    student.requires_grad_()
    DINOLoss(7)(student, teacher, ignore_diagonal=True).backward()
    want = naive.finite_differences(lambda x: naive_loss(x, teacher, 0.1, True), student.detach())
    assert student.grad is not None
    torch.testing.assert_close(student.grad.double(), want, atol=1e-5, rtol=1e-4)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    student, teacher = example(2, 2)
    student = student.bfloat16()
    loss = DINOLoss(7)(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive_loss(student, teacher, 0.1, False).item(), rel=1e-5)


def test_autocast_does_not_lower_the_precision() -> None:
    student, teacher = example(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = DINOLoss(7)(student, teacher)
    assert torch.equal(loss, DINOLoss(7)(student, teacher))


def test_targets_are_not_changed() -> None:
    student, teacher = example(2, 2)
    before = teacher.clone()
    DINOLoss(7)(student, teacher, ignore_diagonal=True)
    assert torch.equal(teacher, before)


def test_single_crop_without_its_diagonal_is_an_error() -> None:
    student, teacher = example(1, 1)
    with pytest.raises(ValueError, match="no pair of crops to compare: 1 student and 1 teacher crops"):
        DINOLoss(7)(student, teacher, ignore_diagonal=True)


def test_different_images_are_an_error() -> None:
    student, teacher = example(2, 2)
    with pytest.raises(ValueError, match=r"student_logits \[2, 3, 7\] and teacher_probs \[2, 1, 7\]"):
        DINOLoss(7)(student, teacher[:, :1])
