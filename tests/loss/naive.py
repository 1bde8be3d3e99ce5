"""Formulas of the losses, written entry by entry in float64, to compare with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def sinkhorn(logits: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Sinkhorn-Knopp in the log domain."""
    exponents = logits.double() / temperature
    for _ in range(n_iterations):
        exponents = exponents - exponents.logsumexp(0)
        exponents = exponents - exponents.logsumexp(1, keepdim=True)
    return exponents.exp()


def cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Of one distribution [K] with another."""
    scores = student.double() / temperature
    log_sum = scores.exp().sum().log()
    return torch.stack([-p * (score - log_sum) for p, score in zip(teacher.double(), scores, strict=True)]).sum()


def koleo(features: Tensor, group: Tensor, first_row: int, topk: int = 1, eps: float = 1e-8) -> Tensor:
    """Own rows are the rows `first_row`... of the group."""
    own = [row / row.norm() for row in features.double()]
    others = [row / row.norm() for row in group.double()]
    logs = []
    for i, row in enumerate(own):
        distances = [((row - other + 1e-8) ** 2).sum().sqrt() for j, other in enumerate(others) if j != i + first_row]
        logs += [torch.log(d + eps) for d in sorted(distances, key=float)[:topk]]
    return -torch.stack(logs).mean()


def gram(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine similarities within each image."""
    errors = []
    for s, t in zip(student.double(), teacher.double(), strict=True):
        for p, q in itertools.product(range(len(s)), repeat=2):
            cosines = [(x[p] @ x[q]) / (x[p].norm() * x[q].norm()) for x in (s, t)]
            errors.append((cosines[0] - cosines[1]) ** 2)
    return torch.stack(errors).mean()


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Gradient of `function` by central differences in float64."""
    at = at.double()
    gradient = torch.zeros_like(at)
    for index in itertools.product(*map(range, at.shape)):
        plus, minus = at.clone(), at.clone()
        plus[index] += step
        minus[index] -= step
        gradient[index] = (function(plus) - function(minus)) / (2 * step)
    assert math.isfinite(gradient.sum().item())
    return gradient
