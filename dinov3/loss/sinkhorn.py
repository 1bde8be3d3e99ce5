"""Sinkhorn-Knopp centring of the teacher (SwAV, arXiv 2006.09882; 2508.10104 uses it for DINO and iBOT).

The logits of a whole batch become targets that use all prototypes about equally, so the teacher cannot collapse.

Prototypes are normalised first and samples last: rows of the result are exact distributions, columns nearly balanced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinov3.distributed import all_reduce

# exp(-80) is far below what float32 can add to a sum of at least 1, and CPUs take a slow path where exp underflows.
_SMALLEST_EXPONENT = -80.0


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Balance prototypes and samples over all ranks of this process's subgroup.

    Args:
        logits: [N, K] teacher scores of N samples for K prototypes, any floating dtype. N may differ between ranks and
            be 0 on some, which still take part in the communication.
        temperature: > 0; the lower, the sharper.
        n_iterations: at least 1.

    Returns:
        [N, K] float32, rows sum to 1.

    Raises:
        ValueError: `n_iterations` is less than 1.
    """
    if n_iterations < 1:
        raise ValueError(f"n_iterations is {n_iterations}, expected at least 1")
    logits = logits.float()
    # exp(logits / temperature) would overflow float32 at logits of 3.6 for a temperature of 0.04, and turn a prototype
    # far below the others into 0 / 0. Subtracting each prototype's maximum over all samples of all ranks is exact,
    # because the first step divides the prototype by its sum anyway. A maximum per *sample* would not be: a few
    # iterations do not undo it.
    highest = logits.amax(0) if len(logits) else logits.new_full(logits.shape[1:], -torch.inf)
    exponents = (logits - all_reduce(highest, "max")).div_(temperature)  # [N, K], <= 0

    exponents -= all_reduce(exponents.clamp(min=_SMALLEST_EXPONENT).exp_().sum(0)).log_()
    exponents -= exponents.amax(1, keepdim=True)
    probs = exponents.clamp_(min=_SMALLEST_EXPONENT).exp_()
    probs *= probs.sum(1, keepdim=True).reciprocal_()
    # No sum can vanish any more: a prototype's best sample holds at least 1 / (samples x prototypes), and a sample's
    # row at least 1 / samples. So the other iterations are plain divisions.
    for _ in range(n_iterations - 1):
        probs *= all_reduce(probs.sum(0)).reciprocal_()
        probs *= probs.sum(1, keepdim=True).reciprocal_()
    return probs
