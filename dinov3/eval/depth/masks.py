"""Which pixels of a measured depth map count."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor


class EvalCropType(Enum):
    """The part of a map that counts."""

    #: What most publications on NYU evaluate: without the border of its 480 x 640 images.
    NYU_EIGEN = "NYU_EIGEN"
    FULL = "FULL"


#: The name that the official release has it under.
_EvalCropType = EvalCropType

#: Rows 45..471 and columns 41..601 (half open) of 480 x 640, as shares of height and width.
NYU_EIGEN_ROWS = (45 / 480, 471 / 480)
NYU_EIGEN_COLUMNS = (41 / 640, 601 / 640)


def make_valid_mask(x: Tensor, eval_crop: EvalCropType | str = EvalCropType.FULL, ignored_value: float = 0.0) -> Tensor:
    """Where a depth map holds a measurement that counts.

    Args:
        x: depth [B, C, H, W].
        eval_crop: the part that counts, or its name.
        ignored_value: stands for "not measured", if all channels of a pixel hold it.

    Returns:
        bool [B, C, H, W], the same for all channels. Pixels with a NaN or an infinity do not count either.

    Raises:
        ValueError: an unknown crop, or a map of other dimensions.
    """
    if x.ndim != 4:
        raise ValueError(f"expected depth maps [B, C, H, W], got shape {tuple(x.shape)}")
    height, width = x.shape[-2:]
    measured = (x != ignored_value).any(dim=1, keepdim=True) & x.isfinite().all(dim=1, keepdim=True)  # [B, 1, H, W]
    if _as_crop(eval_crop) is EvalCropType.NYU_EIGEN:
        inside = torch.zeros_like(measured)
        rows = slice(*(int(share * height) for share in NYU_EIGEN_ROWS))
        columns = slice(*(int(share * width) for share in NYU_EIGEN_COLUMNS))
        inside[..., rows, columns] = True
        measured = measured & inside
    return measured.expand_as(x).clone()


def _as_crop(name: EvalCropType | str) -> EvalCropType:
    if isinstance(name, EvalCropType):
        return name
    if name not in EvalCropType.__members__:
        raise ValueError(f"there is no evaluation crop {name!r}; expected one of {', '.join(EvalCropType.__members__)}")
    return EvalCropType[name]
