"""The projection head of DINO and iBOT (arXiv 2104.14294, section 3.1; 2111.07832): MLP, L2 norm, prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DINOHead(nn.Module):
    """Scores features by prototypes, which are a plain linear layer, without weight normalisation.

    Args:
        in_dim: D, channels of the features.
        out_dim: K, number of prototypes.
        use_bn: batch norm after each hidden linear.
        nlayers: linears of the MLP; less than 1 counts as 1.
        hidden_dim: channels between them.
        bottleneck_dim: channels of the normalised vector.
        mlp_bias: whether the MLP's linears have a bias.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (max(nlayers, 1) - 1)
        layers: list[nn.Module] = []
        for width in widths[:-1]:
            layers.append(nn.Linear(width, hidden_dim, bias=mlp_bias))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
        layers.append(nn.Linear(widths[-1], bottleneck_dim, bias=mlp_bias))
        # The names in the state dict of a one-layer head have no index.
        self.mlp = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
        self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)

    def init_weights(self) -> None:
        """Set truncated normal weights of standard deviation 0.02 and zero biases, and reset batch norms."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm1d):
                module.reset_parameters()

    def forward(self, x: Tensor, no_last_layer: bool = False, only_last_layer: bool = False) -> Tensor:
        """Score the features.

        Args:
            x: [..., D]; with `only_last_layer` the normalised vectors [..., bottleneck_dim].
            no_last_layer: stop at the normalised vectors.
            only_last_layer: begin there.

        Returns:
            [..., K], or [..., bottleneck_dim] with `no_last_layer`.
        """
        if not only_last_layer:
            x = self.mlp(x)
            # The usual 1e-12 is zero in float16.
            x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        return x if no_last_layer else self.last_layer(x)
