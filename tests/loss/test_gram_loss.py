from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov3.loss import GramLoss
from dinov3.loss.gram_loss import sampled_gram_loss

from . import naive


def example(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


def plain(**arguments: bool) -> GramLoss:
    return GramLoss(remove_neg=False, **arguments)


def test_is_the_mean_squared_difference_of_cosines() -> None:
    student, teacher = example(2, 5, 4)
    loss = plain()(student, teacher)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive.gram(student, teacher).item(), rel=1e-5)


def test_gradient() -> None:
    student, teacher = example(2, 3, 4)
    student.requires_grad_()
    plain()(student, teacher).backward()
    want = naive.finite_differences(lambda x: naive.gram(x, teacher), student.detach())
    assert student.grad is not None
    torch.testing.assert_close(student.grad.double(), want, atol=1e-5, rtol=1e-4)


def test_batch_level_compares_patches_of_all_images() -> None:
    student, teacher = example(2, 3, 4)
    got = plain()(student, teacher, img_level=False)
    want = naive.gram(student.flatten(0, 1)[None], teacher.flatten(0, 1)[None])
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.equal(got, plain()(student.flatten(0, 1), teacher.flatten(0, 1), img_level=False))


def test_only_the_call_decides_about_img_level() -> None:
    student, teacher = example(2, 3, 4)
    assert torch.equal(plain(img_level=False)(student, teacher), plain()(student, teacher))


def test_negative_similarities_are_cleared_in_both_or_in_the_teacher() -> None:
    student = torch.tensor([[[1.0, 0.0], [-0.6, 0.8]]])
    teacher = torch.tensor([[[1.0, 0.0], [-0.8, 0.6]]])
    assert GramLoss()(student, teacher).item() == 0
    only_teacher = plain(remove_only_teacher_neg=True)(student, teacher)
    assert only_teacher.item() == pytest.approx(2 * 0.6**2 / 4)
    assert plain()(student, teacher).item() == pytest.approx(2 * 0.2**2 / 4)


def test_dot_products_without_normalisation() -> None:
    student, teacher = torch.full((1, 1, 2), 2.0), torch.full((1, 1, 2), 1.0)
    assert plain(apply_norm=False)(student, teacher).item() == pytest.approx(36)


def test_bfloat16_and_autocast_compute_in_float32() -> None:
    student, teacher = example(2, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = plain()(student, teacher)
    assert torch.equal(under_autocast, plain()(student, teacher))
    rounded = student.bfloat16()
    assert torch.equal(plain()(rounded, teacher), plain()(rounded.float(), teacher))


def test_both_ways_of_clearing_are_an_error() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        GramLoss(remove_neg=True, remove_only_teacher_neg=True)


def test_features_of_other_patches_are_an_error() -> None:
    student, teacher = example(2, 5, 4)
    with pytest.raises(ValueError, match="must be of the same patches"):
        plain()(student, teacher[:, :4])
    with pytest.raises(ValueError, match=r"img_level=True needs features \[images, patches, D\], got \[10, 4\]"):
        plain()(student.flatten(0, 1), teacher.flatten(0, 1))


@pytest.mark.parametrize("remove_neg", [False, True])
def test_no_patch_at_all_gives_zero_with_a_gradient(remove_neg: bool) -> None:
    student = torch.empty(0, 4, requires_grad=True)
    loss = GramLoss(remove_neg=remove_neg)(student, torch.empty(0, 4), img_level=False)
    loss.backward()
    assert loss.item() == 0 and student.grad is not None


def test_sampled_loss_compares_the_same_patches_of_all_images_and_moves_only_the_head() -> None:
    backbone, head = (torch.randn(2, 9, width, requires_grad=True) for width in (5, 4))
    torch.manual_seed(0)
    loss = sampled_gram_loss(backbone, head, 0.5)
    torch.manual_seed(0)
    chosen = torch.randperm(9)[:4]
    expected = GramLoss(remove_neg=False)(head[:, chosen], backbone[:, chosen])
    assert loss == expected
    loss.backward()
    assert backbone.grad is None and head.grad is not None
    assert head.grad.abs().sum(dim=(0, 2)).nonzero().flatten().tolist() == sorted(chosen.tolist())
    with pytest.raises(ValueError, match=r"patch_sampling_rate=0.1 leaves none of 9 patches"):
        sampled_gram_loss(backbone, head, 0.1)
