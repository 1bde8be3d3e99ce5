"""L-BFGS as a coroutine: it asks for a loss and gradient where it wants to look, so that many searches share one pass.

J. Nocedal, "Updating quasi-Newton matrices with limited storage", 1980. For smooth convex functions alone, which is why
a step needs no second condition, and an overshoot is taken back by a secant step of the slopes.

Notable:
- A search knows nothing of the others: its iterates are the same bits whether it runs alone or beside fifty.
- The caller's preconditioner stands for the inverse Hessian at the start.
- A search ends by the decrease that a step to the minimum of the quadratic model would bring. Unlike the
  gradient's norm, that does not mistake a flat valley for its bottom.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Asks for (loss, gradient) at a point.
Search = Generator[Tensor, tuple[float, Tensor], "Minimum"]
HISTORY = 10
SMALLEST_STEP = 1e-6
SMALL_SHARE = 1e-8
NEGLIGIBLE = 1e-4


class Minimum(NamedTuple):
    """Where a search ended.

    Attributes:
        point: as the start.
        n_iterations: steps taken.
        converged: the loss is as close to the smallest as asked for, or as rounding lets it come.
    """

    point: Tensor
    n_iterations: int
    converged: bool


def search_minimum(
    start: Tensor, precondition: Callable[[Tensor], Tensor], *, tolerance: float, noise: float, max_iterations: int
) -> Search:
    """Minimise a convex function; yields points, and is to be sent the loss and gradient there.

    Args:
        start: float64, of any shape.
        precondition: multiplies by an approximation of the inverse Hessian at the start, symmetric and positive.
        tolerance: expected further decrease of the loss that ends the search, if it is a small share of the first, or
            negligible.
        noise: error of the losses by rounding.
        max_iterations: steps.
    """
    point = start
    loss, gradient = yield point
    pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=HISTORY)
    first_slope = 0.0
    for iteration in range(max_iterations):
        direction = _newton_direction(gradient, precondition, pairs)
        slope = _dot(gradient, direction)
        first_slope = slope if iteration == 0 else first_slope
        close = -slope / 2 <= tolerance and slope >= SMALL_SHARE * first_slope
        if close or -slope / 2 <= NEGLIGIBLE * tolerance:
            return Minimum(point, iteration, True)
        step = 1.0
        while True:
            new_point = point + step * direction
            new_loss, new_gradient = yield new_point
            new_slope = _dot(new_gradient, direction)
            decreased = new_loss <= loss + 1e-4 * step * slope
            # Where rounding hides the decrease, the slope tells: it must not have grown on the other side.
            if decreased or (new_loss <= loss + noise and new_slope <= -0.8 * slope):
                break
            step *= min(max(slope / (slope - new_slope), 0.1), 0.6) if new_slope > 0 else 0.5
            if step < SMALLEST_STEP:
                return Minimum(point, iteration, True)
        change = new_gradient - gradient
        curvature = _dot(step * direction, change)
        if curvature > 0:
            pairs.append((step * direction, change, curvature))
        point, loss, gradient = new_point, new_loss, new_gradient
    return Minimum(point, max_iterations, False)


def run_together(
    searches: Sequence[Search],
    evaluate: Callable[[Sequence[int], Sequence[Tensor]], list[tuple[float, Tensor]]],
    after_round: Callable[[int, int], None] = lambda n_rounds, n_ended: None,
) -> list[Minimum]:
    """Run searches to their ends, with one call of `evaluate` for a point of each.

    Args:
        searches: not started.
        evaluate: the losses and gradients of the searches with these numbers, each at its point.
        after_round: told the number of calls so far, and how many searches have ended in the last of them.
    """
    minima: dict[int, Minimum] = {}
    points = {number: next(search) for number, search in enumerate(searches)}
    n_rounds = 0
    while points:
        n_active = len(points)
        answers = evaluate(list(points), list(points.values()))
        for number, answer in zip(list(points), answers, strict=True):
            try:
                points[number] = searches[number].send(answer)
            except StopIteration as end:
                minima[number] = end.value
                del points[number]
        n_rounds += 1
        after_round(n_rounds, n_active - len(points))
    return [minima[number] for number in range(len(searches))]


def _newton_direction(
    gradient: Tensor, precondition: Callable[[Tensor], Tensor], pairs: Sequence[tuple[Tensor, Tensor, float]]
) -> Tensor:
    direction = -gradient
    weights = []
    for step, change, curvature in reversed(pairs):
        weights.append(_dot(step, direction) / curvature)
        direction = direction - weights[-1] * change
    direction = precondition(direction)
    if pairs:
        _, change, curvature = pairs[-1]
        direction = direction * (curvature / _dot(change, precondition(change)))
    for (step, change, curvature), weight in zip(pairs, reversed(weights), strict=True):
        direction = direction + (weight - _dot(change, direction) / curvature) * step
    return direction


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.flatten(), other.flatten()))
