"""Sizes of windows and canvases, and what is read."""

from __future__ import annotations

import pytest
import torch

from dinov3.heads.plain_detr.backbone import LearnedEncoding, ViTReader, WindowedReader, padded_side, window_sides
from dinov3.heads.plain_detr.nested import NestedTensor, nested_tensor_from_tensor_list
from tests.heads.tiny import images, tiny_backbone


def test_windows_are_equal_but_for_the_last() -> None:
    assert window_sides(447, 3, 16) == [160, 160, 127]
    assert window_sides(64, 3, 16) == [32, 32, 0]
    assert window_sides(112, 2, 16) == [64, 48]


def test_canvases_hold_every_pixel_and_leave_no_window_empty() -> None:
    for n_windows in (0, 2, 3, 5):
        for side in range(1, 400):
            padded = padded_side(side, 16, n_windows=n_windows, least=64)
            assert padded >= max(side, 64) and padded % 16 == 0
            assert not n_windows or window_sides(padded, n_windows, 16)[-1] >= 16
    assert [padded_side(side, 16, n_windows=3, least=64) for side in (1, 64, 80, 81, 1024)] == [80, 80, 80, 96, 1024]


def test_windows_too_small_to_read_are_named() -> None:
    reader = WindowedReader(ViTReader(tiny_backbone(), 2), 3, 16)
    with pytest.raises(ValueError, match=r"images of \[64, 96\] pixels cannot be read in 3 windows .* pad the images"):
        reader(images(64, 96))


def test_windows_are_read_as_if_one_after_the_other() -> None:
    reader = ViTReader(tiny_backbone(), [3, 7])
    x = images(112, 96, batch=2)
    got = WindowedReader(reader, 2, 16)(x)[:, reader.n_channels :]
    for rows, h in ((slice(0, 64), slice(0, 4)), (slice(64, 112), slice(4, 7))):
        for columns, w in ((slice(0, 48), slice(0, 3)), (slice(48, 96), slice(3, 6))):
            torch.testing.assert_close(got[..., h, w], reader(x[..., rows, columns]), rtol=0, atol=2e-5)


def test_the_backbone_stays_frozen_and_in_evaluation_mode() -> None:
    reader = ViTReader(tiny_backbone(), 2, use_layernorm=True).train()
    assert reader.training and not reader.backbone.training
    assert {name.split(".")[0] for name, p in reader.named_parameters() if p.requires_grad} == {"layer_norms"}


def test_learned_encodings_end_at_50_cells() -> None:
    with pytest.raises(ValueError, match=r"51 x 3 cells: position_embedding='learned' has 50 .* use smaller images"):
        LearnedEncoding(4)(torch.zeros(1, 51, 3, dtype=torch.bool))


def test_nested_tensors() -> None:
    batch = nested_tensor_from_tensor_list([torch.ones(3, 2, 5), torch.ones(3, 4, 1)])
    assert batch.tensors.shape == (2, 3, 4, 5) and len(batch) == 2
    assert batch.tensors.sum() == 3 * 14 and (~batch.mask).sum() == 14
    assert isinstance(batch.to("meta"), NestedTensor) and batch.to("meta").mask.is_meta
    with pytest.raises(ValueError, match="no images"):
        nested_tensor_from_tensor_list([])
    with pytest.raises(ValueError, match=r"got one of shape \[4, 4\]"):
        nested_tensor_from_tensor_list([torch.ones(4, 4)])
