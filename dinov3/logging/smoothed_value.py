"""A series of numbers: statistics of its newest values, and the average of all.

Notable: `update` with a tensor does not wait for the device; tensors become numbers when a statistic is asked for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3.distributed import all_reduce, runtime

MAX_PENDING = 1000


class SmoothedValue:
    """Window statistics and global average of a series.

    Args:
        window_size: number of newest values that `median`, `avg` and `max` are taken over.
        fmt: what `str` shows; may name `median`, `avg`, `global_avg`, `max` and `value`.
    """

    def __init__(self, window_size: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})") -> None:
        self.fmt = fmt
        self._window: deque[float] = deque(maxlen=window_size)
        self._total = 0.0
        self._count = 0
        self._pending: list[tuple[Tensor | float, int]] = []

    def update(self, value: Any, num: int = 1) -> None:
        """Append a value.

        Args:
            value: a number, NumPy scalar, bool, or tensor or array of one element.
            num: its weight in the global average.
        """
        if isinstance(value, Tensor):
            value = value.detach().clone()
        else:
            value = float(value.item() if isinstance(value, np.ndarray) else value)
        self._pending.append((value, num))
        if len(self._pending) >= MAX_PENDING:
            settle([self])

    @property
    def median(self) -> float:
        """Median of the window, the lower of the two middle values of an even number; NaN when empty."""
        values = self._values()
        if not values or any(math.isnan(value) for value in values):
            return math.nan
        return sorted(values)[(len(values) - 1) // 2]

    @property
    def avg(self) -> float:
        """Mean of the window; NaN when empty."""
        values = self._values()
        return sum(values) / len(values) if values else math.nan

    @property
    def max(self) -> float:
        """Largest of the window; NaN when empty."""
        values = self._values()
        return max(values) if values and not any(math.isnan(value) for value in values) else math.nan

    @property
    def value(self) -> float:
        """The newest value; NaN when empty."""
        values = self._values()
        return values[-1] if values else math.nan

    @property
    def global_avg(self) -> float:
        """Weighted mean of everything; NaN when empty."""
        settle([self])
        return self._total / self._count if self._count else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return window, total and count, as plain numbers."""
        return {"window": list(self._values()), "total": self._total, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._pending.clear()
        self._window = deque(state["window"], maxlen=self._window.maxlen)
        self._total = state["total"]
        self._count = state["count"]

    def __str__(self) -> str:
        names = ("median", "avg", "global_avg", "max", "value")
        return self.fmt.format(**{name: getattr(self, name) for name in names})

    def _values(self) -> deque[float]:
        settle([self])
        return self._window


def settle(meters: Iterable[SmoothedValue]) -> None:
    """Turn the tensors that `meters` hold into numbers, with one wait for the device."""
    pending = [(meter, value, num) for meter in meters for value, num in meter._pending]
    tensors = [value for _, value, _ in pending if isinstance(value, Tensor)]
    if tensors:
        device = tensors[0].device
        numbers = iter(torch.stack([tensor.to(device, torch.float32).reshape(()) for tensor in tensors]).tolist())
    for meter, value, num in pending:
        number = next(numbers) if isinstance(value, Tensor) else value
        meter._window.append(number)
        meter._total += number * num
        meter._count += num
        meter._pending.clear()


def synchronize(meters: Iterable[SmoothedValue]) -> None:
    """Sum counts and totals of `meters` over the ranks, with one all-reduce."""
    meters = list(meters)
    settle(meters)
    if not meters:
        return
    sums = torch.tensor([[meter._count, meter._total] for meter in meters], dtype=torch.float64)
    reduced = all_reduce(sums.to(runtime.device())).tolist()
    for meter, (count, total) in zip(meters, reduced, strict=True):
        meter._count, meter._total = int(count), total
