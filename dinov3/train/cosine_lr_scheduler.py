"""Values over a training run: cosine decays with a linear warm-up (arXiv 1608.03983), in the two published forms.

`CosineScheduler` is DINOv2's (2304.07193); `linear_warmup_cosine_decay` is DINOv3's (2508.10104), whose cosine may be
short, rising or absent and is followed by a constant. Numbers of iterations may be fractional (a fraction of an epoch)
and are rounded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class CosineScheduler:
    """A frozen start, a linear warm-up and a cosine; afterwards the final value.

    `schedule` is the float64 array of the first `total_iters` values.

    Args:
        base_value: value after the warm-up.
        final_value: value that the cosine approaches.
        total_iters: length, in iterations, with freeze and warm-up.
        warmup_iters: length of the linear part, which contains both of its ends.
        start_warmup_value: where the linear part starts.
        freeze_iters: number of zeros at the start.
        trunc_extra: > 0 cuts the end of a cosine that is longer by this fraction, and stretches the rest so that it
            still ends at `final_value`, which is then reached at the last iteration.

    Raises:
        ValueError: freeze and warm-up are longer than the whole.
    """

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: float,
        warmup_iters: float = 0,
        start_warmup_value: float = 0,
        freeze_iters: float = 0,
        trunc_extra: float = 0.0,
    ) -> None:
        self.final_value = float(final_value)
        self.total_iters = round(total_iters)
        warmup, freeze = round(warmup_iters), round(freeze_iters)
        remaining = self.total_iters - warmup - freeze
        if remaining < 0:
            raise ValueError(
                f"a schedule of {self.total_iters} iterations cannot hold {freeze} frozen and {warmup} warm-up "
                "iterations: train longer or warm up for fewer epochs"
            )
        self.schedule: NDArray[np.float64] = np.concatenate(
            [
                np.zeros(freeze),
                np.linspace(start_warmup_value, base_value, warmup),
                final_value + (base_value - final_value) * _falling_cosine(remaining, trunc_extra),
            ]
        )
        assert len(self.schedule) == self.total_iters

    def __getitem__(self, iteration: int) -> float:
        """The value at `iteration`: `final_value` past the end; negative ones count from the end."""
        return float(self.schedule[iteration]) if iteration < self.total_iters else self.final_value


def linear_warmup_cosine_decay(
    start: float,
    peak: float,
    end: float,
    warmup_iterations: float,
    total_iterations: float,
    cosine_iterations: float | None = None,
) -> NDArray[np.float64]:
    """A linear warm-up, a cosine from `peak` to `end`, and `end` for the rest.

    Args:
        start: first value of the warm-up.
        peak: value that the warm-up approaches (it does not contain it) and the cosine starts with.
        end: value that the cosine ends with; may be higher than `peak`.
        warmup_iterations: length of the warm-up.
        total_iterations: length of the result.
        cosine_iterations: length of the cosine; None: everything after the warm-up. 0 gives a step to `end`.

    Returns:
        float64 array of `total_iterations` values. Past its end the last value holds: the caller clamps the index.

    Raises:
        ValueError: warm-up and cosine are longer than the whole.
    """
    warmup, total = round(warmup_iterations), round(total_iterations)
    cosine = total - warmup if cosine_iterations is None else round(cosine_iterations)
    if min(warmup, cosine) < 0 or warmup + cosine > total:
        raise ValueError(
            f"a schedule of {total} iterations cannot hold {warmup} warm-up and {cosine} cosine iterations: "
            "train longer, or shorten schedules' warmup_epochs or cosine_epochs"
        )
    return np.concatenate(
        [
            np.linspace(start, peak, warmup, endpoint=False),
            end + 0.5 * (peak - end) * (1 + np.cos(np.linspace(0, np.pi, cosine))),
            np.full(total - warmup - cosine, float(end)),
        ]
    )


def _falling_cosine(n: int, trunc_extra: float) -> NDArray[np.float64]:
    # n values, from 1 towards 0
    if trunc_extra == 0:
        return 0.5 * (1 + np.cos(np.pi * np.arange(n) / n))
    if n < 2:
        return np.zeros(n)
    cosine = 0.5 * (1 + np.cos(np.linspace(0, np.pi, int((1 + trunc_extra) * n))[:n]))
    return (cosine - cosine[-1]) / (1 - cosine[-1])
