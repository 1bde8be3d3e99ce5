"""Data types by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dinov3.utils.messages import did_you_mean

_INTEGERS = [f"{kind}{bits}" for kind in ("uint", "int") for bits in (8, 16, 32, 64)]
_NAMES = ["bool", *_INTEGERS, "bfloat16", "float16", "float32", "float64", "complex64", "complex128"]
_SHORT_NAMES: dict[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def as_torch_dtype(dtype: Any) -> torch.dtype:
    """Return the torch dtype that `dtype` stands for.

    Args:
        dtype: a torch dtype, a NumPy dtype or type, or a name: NumPy's (`"float32"`, `"f4"`), `"bfloat16"`, or the
            short ones of the configuration (`"fp32"`, `"bf16"`, ...).

    Raises:
        KeyError: there is no such torch dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    name = _SHORT_NAMES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if name != "bfloat16":  # NumPy does not know it.
        try:
            name = np.dtype(name).name
        except TypeError:
            name = str(name)
    if name not in _NAMES:
        known = [*_NAMES, *_SHORT_NAMES]
        raise KeyError(f"no torch dtype for {dtype!r}{did_you_mean(name, known)}; known names: {', '.join(known)}")
    return getattr(torch, name)
