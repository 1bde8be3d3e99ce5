"""Arguments that are one integer or several: Python's own, NumPy's, or an array of them."""

from __future__ import annotations

import operator
from collections.abc import Iterable


def as_integers(value: int | Iterable[int]) -> list[int]:
    """Return one integer, or those of a sequence or array, as a list of `int`.

    Raises:
        TypeError: a value is not an integer.
    """
    # Not by isinstance(value, int), which NumPy's integers are not.
    return [operator.index(entry) for entry in (value if isinstance(value, Iterable) else [value])]


def as_pair(size: int | Iterable[int]) -> tuple[int, int]:
    """Return (height, width) of a size that is one integer for both sides, or two.

    Raises:
        TypeError: a side is not an integer.
        ValueError: there are not one or two sides.
    """
    height, width = as_integers(size) if isinstance(size, Iterable) else as_integers(size) * 2
    return height, width
