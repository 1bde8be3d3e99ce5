"""The dtype that a dense model computes in, whatever the caller's autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.amp.autocast_mode import is_autocast_available


def autocast_to(device_type: str, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return a region of autocast in `dtype`; float32 turns autocast off, even inside another region.

    Args:
        device_type: where the computation runs; nothing happens on devices without autocast (`meta`).
        dtype: float32, bfloat16 or float16.
    """
    if not is_autocast_available(device_type):
        return nullcontext()
    if dtype == torch.float32:
        return torch.autocast(device_type, enabled=False)
    return torch.autocast(device_type, dtype=dtype)
