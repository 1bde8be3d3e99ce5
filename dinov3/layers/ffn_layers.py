"""Feed-forward networks of transformer blocks: the two-layer MLP and SwiGLU (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.utils import cat_keep_shapes, uncat_with_shapes


class _TokenwiseModule(nn.Module):
    def forward_list(self, x_list: list[Tensor]) -> list[Tensor]:
        """Apply `forward` to several tensors [..., in_features], on all their tokens at once."""
        flat, shapes, num_tokens = cat_keep_shapes(x_list)
        return uncat_with_shapes(self(flat), shapes, num_tokens)


class Mlp(_TokenwiseModule):
    """Linear, activation, linear.

    Args:
        in_features: input channels.
        hidden_features: channels between the two. Default: as many as the input.
        out_features: output channels. Default: as many as the input.
        act_layer: makes the activation.
        drop: dropout after the activation and after the output.
        bias: whether both linears have a bias.
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
        hidden_features: hidden channels of the MLP that this replaces. Default: as many as the input.
        out_features: output channels. Default: as many as the input.
        bias: whether all linears have a bias.
        align_to: the number of hidden channels is a multiple of this.

    Raises:
        ValueError: no hidden channel is left.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
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

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))
