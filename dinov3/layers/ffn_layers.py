"""Feed-forward networks of transformer blocks: the two-layer MLP and SwiGLU (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.utils import cat_keep_shapes, uncat_with_shapes


class _TokenwiseModule(nn.Module):
    def forward_list(self, x_list: list[Tensor]) -> list[Tensor]:
        """`forward` of several tensors [..., in_features], computed on all their tokens at once."""
        flat, shapes, num_tokens = cat_keep_shapes(x_list)
        return uncat_with_shapes(self(flat), shapes, num_tokens)


class Mlp(_TokenwiseModule):
    """Linear, activation, linear.

    Args:
        in_features: input channels.
        hidden_features: channels between the two; None: as many as the input.
        out_features: output channels; None: as many as the input.
        act_layer: makes the activation.
        drop: dropout after the activation and after the output.
        bias: of both linears.
        device: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        drop: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, device=device)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias, device=device)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SwiGLUFFN(_TokenwiseModule):
    """w3(silu(w1 x) * w2 x): a gated unit with two thirds of the hidden channels, rounded up to a multiple.

    Args:
        in_features: input channels.
        hidden_features: hidden channels of the MLP that this replaces; None: as many as the input.
        out_features: output channels; None: as many as the input.
        act_layer: not used, the gate is a SiLU; there so that blocks can build either kind alike.
        drop: dropout after the gate and after the output.
        bias: of all linears.
        align_to: the number of hidden channels is a multiple of this.
        device: of the parameters.

    Raises:
        ValueError: no hidden channel is left.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Any = None,
        drop: float = 0.0,
        bias: bool = True,
        align_to: int = 8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        two_thirds = int((hidden_features or in_features) * 2 / 3)
        hidden = two_thirds + (-two_thirds % align_to)
        if hidden == 0:
            raise ValueError(
                f"SwiGLU keeps two thirds of hidden_features={hidden_features}, which is no channel at all"
            )
        self.w1 = nn.Linear(in_features, hidden, bias=bias, device=device)
        self.w2 = nn.Linear(in_features, hidden, bias=bias, device=device)
        self.w3 = nn.Linear(hidden, out_features or in_features, bias=bias, device=device)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return self.drop(self.w3(self.drop(F.silu(self.w1(x)) * self.w2(x))))
