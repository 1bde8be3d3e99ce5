"""Pixels that count."""

from __future__ import annotations

import pytest
import torch

from dinov3.eval.depth.masks import EvalCropType, _EvalCropType, make_valid_mask


def test_the_eigen_crop_of_an_nyu_image() -> None:
    mask = make_valid_mask(torch.ones(2, 1, 480, 640), EvalCropType.NYU_EIGEN)
    want = torch.zeros(2, 1, 480, 640, dtype=torch.bool)
    want[:, :, 45:471, 41:601] = True
    assert torch.equal(mask, want)


def test_crops_are_also_known_by_name() -> None:
    x = torch.ones(1, 1, 48, 64)
    assert torch.equal(make_valid_mask(x, "NYU_EIGEN"), make_valid_mask(x, _EvalCropType.NYU_EIGEN))
    assert make_valid_mask(x, "FULL").all()
    with pytest.raises(ValueError, match="'EIGEN'; expected one of NYU_EIGEN, FULL"):
        make_valid_mask(x, "EIGEN")


def test_a_pixel_is_ignored_if_all_its_channels_are() -> None:
    x = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]]).view(1, 2, 1, 3)
    assert make_valid_mask(x).tolist() == [[[[False, True, True]], [[False, True, True]]]]
    assert make_valid_mask(x, ignored_value=-1.0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_no_measurement(value: float) -> None:
    x = torch.ones(1, 1, 2, 2)
    x[0, 0, 1, 0] = value
    assert make_valid_mask(x).tolist() == [[[[True, True], [False, True]]]]


def test_the_mask_is_memory_of_its_own() -> None:
    mask = make_valid_mask(torch.ones(1, 3, 2, 2))
    mask[0, 0] = False
    assert mask[0, 1:].all()


def test_other_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(480, 640\)"):
        make_valid_mask(torch.ones(480, 640))
