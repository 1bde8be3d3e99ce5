"""Class indices of datasets whose samples may lack one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

NO_LABEL = -1


def all_or_no_labels(labels: np.ndarray, dataset: str, name_of: Callable[[int], str]) -> np.ndarray | None:
    """`labels`, or None if all of them are `NO_LABEL`.

    Raises:
        ValueError: some are, and some are not.
    """
    missing = np.flatnonzero(labels == NO_LABEL)
    if len(missing) == len(labels):
        return None
    if len(missing):
        raise ValueError(
            f"{dataset}: {len(missing)} of {len(labels)} samples have no label, the first is {name_of(int(missing[0]))}"
        )
    return labels
