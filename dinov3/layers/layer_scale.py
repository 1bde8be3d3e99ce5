"""LayerScale: a learned factor per channel on each residual branch (CaiT, arXiv 2103.17239, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """x * gamma.

    Args:
        dim: D, number of channels.
        init_values: the factor that `reset_parameters` sets for every channel.
    """

    def __init__(self, dim: int, init_values: float = 1e-5, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to `init_values`."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return x * self.gamma


def add_scaled(x: Tensor, residual: Tensor, scale: nn.Module) -> Tensor:
    """Return x + scale(residual), for a `LayerScale` in one pass over memory."""
    if isinstance(scale, LayerScale):
        return torch.addcmul(x, residual, scale.gamma)
    return x + scale(residual)
