"""NumPy files that are never seen half-written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


def save_array(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write `array` to `path` (`.npy`) under a temporary name and rename it; directories are made as needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, array)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
