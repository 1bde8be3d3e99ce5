"""A perceptron of several linear layers with ReLUs in between, as the heads of query-based models have it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Perceptron(nn.Module):
    """Map vectors through `n_layers` linear layers, with a ReLU after each but the last.

    Its entries are `layers.0.*`, `layers.1.*`, ...

    Args:
        in_features: width of the input.
        hidden_features: width between the layers.
        out_features: width of the output.
        n_layers: at least 1.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int, n_layers: int) -> None:
        super().__init__()
        widths = [in_features, *[hidden_features] * (n_layers - 1), out_features]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)
