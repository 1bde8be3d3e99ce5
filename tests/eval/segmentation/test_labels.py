"""Class ids from 0 of labels that count from 1."""

from __future__ import annotations

import pytest
import torch

from dinov3.eval.segmentation.labels import preprocess_nonzero_labels

INTEGERS = [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.uint32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_zero_is_unlabelled_and_classes_count_from_zero(dtype: torch.dtype) -> None:
    label = torch.tensor([[0, 1, 150], [254, 255, 2]]).to(dtype)
    reduced = preprocess_nonzero_labels(label)
    assert reduced.dtype == dtype
    assert reduced.tolist() == [[255, 0, 149], [253, 255, 1]]
    assert label.tolist() == [[0, 1, 150], [254, 255, 2]]


def test_another_value_may_stand_for_unlabelled() -> None:
    label = torch.tensor([0, 1, 255, 300])
    assert preprocess_nonzero_labels(label, ignore_index=-1).tolist() == [-1, 0, 254, 299]
    with pytest.raises(ValueError, match=r"ignore_index=-1 does not fit labels of torch.uint8"):
        preprocess_nonzero_labels(label.to(torch.uint8), ignore_index=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_are_integers(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"got {dtype}"):
        preprocess_nonzero_labels(torch.ones(3, dtype=dtype))
