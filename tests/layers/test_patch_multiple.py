"""Images brought to multiples of a patch, and their padding cut off again."""

from __future__ import annotations

import pytest
import torch

from dinov3.layers.patch_multiple import CenterPadding, StretchToMultiple, cut_margins


def test_smaller_half_of_the_padding_is_on_the_top_and_left() -> None:
    pad = CenterPadding(16)
    assert pad.margins(100, 71) == (6, 6, 4, 5)
    assert pad.margins(33, 48) == (7, 8, 0, 0)
    image = torch.full((2, 3, 33, 48), 7.0)
    padded = pad(image)
    assert padded.shape == (2, 3, 48, 48)
    assert not padded[..., :7, :].any() and not padded[..., 40:, :].any() and padded[..., 7:40, :].eq(7).all()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 4)])
def test_any_number_of_leading_dimensions(leading: tuple[int, ...]) -> None:
    images = torch.arange(5 * 6.0).reshape(5, 6).expand(*leading, 5, 6)
    one = torch.arange(5 * 6.0).reshape(1, 1, 5, 6)
    for adapt in (CenterPadding(4), StretchToMultiple(4)):
        adapted = adapt(images)
        assert adapted.shape == (*leading, 8, 8)
        torch.testing.assert_close(adapted, adapt(one)[0, 0].expand(*leading, 8, 8))


def test_images_of_such_sides_are_returned_as_they_are() -> None:
    image = torch.randn(1, 3, 32, 16)
    for adapt in (CenterPadding(16), StretchToMultiple(16)):
        assert adapt(image) is image


def test_stretching_does_not_antialias_and_lets_gradients_through() -> None:
    image = torch.randn(1, 1, 5, 7, requires_grad=True)
    stretched = StretchToMultiple(4)(image)
    want = torch.nn.functional.interpolate(image, size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(stretched, want)
    stretched.sum().backward()
    assert image.grad is not None and image.grad.sum() == pytest.approx(64)


@pytest.mark.parametrize("size", [(5, 7), (8, 8), (9, 12)])
def test_cutting_undoes_padding(size: tuple[int, int]) -> None:
    image, pad = torch.randn(2, 1, *size), CenterPadding(4)
    assert torch.equal(cut_margins(pad(image), pad.margins(*size)), image)


def test_rows_and_columns_that_were_not_seen_repeat_the_last_ones() -> None:
    seen = torch.arange(6.0).reshape(1, 1, 2, 3)
    whole = cut_margins(seen, (0, -1, 0, -2))
    assert whole[0, 0].tolist() == [[0, 1, 2, 2, 2], [3, 4, 5, 5, 5], [3, 4, 5, 5, 5]]


@pytest.mark.parametrize("adapter", [CenterPadding, StretchToMultiple])
def test_multiple_below_one(adapter: type) -> None:
    with pytest.raises(ValueError, match="multiple=0"):
        adapter(0)
