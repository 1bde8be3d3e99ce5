"""The dtype that a dense model computes in."""

from __future__ import annotations

import pytest
import torch

from dinov3.heads.precision import autocast_to


@pytest.mark.parametrize("outer", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inner_region_wins(dtype: torch.dtype, outer: torch.dtype | None) -> None:
    matrix = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=outer, enabled=outer is not None), autocast_to("cpu", dtype):
        assert (matrix @ matrix).dtype == dtype


def test_devices_without_autocast() -> None:
    with autocast_to("meta", torch.bfloat16):
        assert torch.ones(2, device="meta").dtype == torch.float32
