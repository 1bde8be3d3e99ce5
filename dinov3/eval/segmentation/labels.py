"""Class ids of label maps."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = 255

#: Unsigned integers that PyTorch hardly computes with.
WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def preprocess_nonzero_labels(label: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Class ids from 0 of labels where 0 means "unlabelled" and classes count from 1, as in ADE20K.

    Args:
        label: class ids of any shape, of an integer dtype.
        ignore_index: what unlabelled pixels become; pixels that are this already stay so. It must fit the dtype and be
            no class id: with 255 there can be at most 255 classes.

    Returns:
        A new tensor of the same dtype: `ignore_index` for 0 and `ignore_index`, otherwise one less.

    Raises:
        TypeError: the dtype is not an integer one.
        ValueError: `ignore_index` does not fit the dtype.
    """
    if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        raise TypeError(f"labels are class ids of an integer dtype, got {label.dtype}")
    limits = torch.iinfo(label.dtype)
    if not limits.min <= ignore_index <= limits.max:
        raise ValueError(f"ignore_index={ignore_index} does not fit labels of {label.dtype}")
    ids = label.long() if label.dtype in WIDE_UNSIGNED else label
    ignored = (ids == 0) | (ids == ignore_index)
    return (ids - 1).masked_fill(ignored, ignore_index).to(label.dtype)
