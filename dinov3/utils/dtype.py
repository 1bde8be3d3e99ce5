"""Data types by name."""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
import torch

_BY_NAME: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
_SHORT_NAMES: dict[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def as_torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype that `dtype` stands for.

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
    if name not in _BY_NAME:
        known = [*_BY_NAME, *_SHORT_NAMES]
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise KeyError(f"no torch dtype for {dtype!r}: {hint}known names: {', '.join(known)}")
    return _BY_NAME[name]
