from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dinov3.utils.integers import as_integers, as_pair


@pytest.mark.parametrize(
    ("value", "integers"),
    [
        (3, [3]),
        (np.int64(3), [3]),
        ((1, np.uint8(2)), [1, 2]),
        (np.array([1, 2]), [1, 2]),
        (torch.tensor([2]), [2]),
        (range(2), [0, 1]),
    ],
)
def test_integers_of_any_kind_become_a_list_of_int(value: Any, integers: list[int]) -> None:
    found = as_integers(value)
    assert found == integers and {type(entry) for entry in found} == {int}


@pytest.mark.parametrize("value", [1.5, [1, 2.0], None, "2"])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        as_integers(value)


def test_a_size_is_one_side_or_two() -> None:
    assert as_pair(np.int32(4)) == as_pair([4] * 2) == (4, 4)
    assert as_pair(np.array([4, 6])) == (4, 6)
    with pytest.raises(ValueError):
        as_pair([4])
