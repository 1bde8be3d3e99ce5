"""The dtype that a dense model computes in, whatever the caller's autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_to(device_type: str, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return a region of autocast in `dtype`; float32 turns autocast off, even inside another region.

    Args:
        device_type: where the computation runs; nothing happens on `meta`, which has no autocast.
        dtype: float32, bfloat16 or float16.
    """
    if device_type == "meta":  # Not is_autocast_available(), which PyTorch 2.7 cannot compile or export.
        return nullcontext()
    if dtype == torch.float32:
        return torch.autocast(device_type, enabled=False)
    return torch.autocast(device_type, dtype=dtype)
