from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.loss import contrastive_loss as module
from dinov3.loss.contrastive_loss import contrastive_loss


def features(n: int = 10, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(n, width, generator=generator), dim=1) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_(), torch.tensor([7.0], requires_grad=True)


def plain(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits, pairs = scale * image @ text.mT, torch.arange(len(image))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.mT, pairs)) / 2


def gradients(loss: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("n_kept", [0, 10**6])
@pytest.mark.parametrize("n_rows", [3, 128])
def test_equals_the_plain_formula_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, n_kept: int, n_rows: int
) -> None:
    monkeypatch.setattr(module, "N_KEPT", n_kept)
    monkeypatch.setattr(module, "N_ROWS", n_rows)
    leaves = features()
    loss, expected = contrastive_loss(*leaves), plain(*leaves)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, leaves), gradients(expected, leaves))


def test_a_shared_gradient_is_not_changed() -> None:
    leaves = features()
    other = torch.ones((), requires_grad=True)
    total = other + contrastive_loss(*leaves)
    assert torch.autograd.grad(total * 4, [other])[0] == 4
    (other * 3 + contrastive_loss(*leaves) * 3).backward()
    assert other.grad == 3


def test_a_scale_of_no_dimension_and_half_precision() -> None:
    image, text, scale = features()
    assert torch.equal(contrastive_loss(image, text, scale[0]), contrastive_loss(image, text, scale))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(image.bfloat16(), text.bfloat16(), scale)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(image.bfloat16().float(), text.bfloat16().float(), scale))


def test_one_pair_has_no_loss_and_no_gradient() -> None:
    leaves = features(n=1)
    loss = contrastive_loss(*leaves)
    assert loss == 0
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(loss, leaves))


def test_other_numbers_of_texts_are_refused() -> None:
    image, text, scale = features()
    with pytest.raises(ValueError, match=r"as many texts as images, got \[10, 6\] of images and \[9, 6\]"):
        contrastive_loss(image, text[:9], scale)
