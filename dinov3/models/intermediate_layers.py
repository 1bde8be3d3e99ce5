"""A frozen backbone that returns the tokens of some of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


class ModelWithIntermediateLayers(nn.Module):
    """Return the tokens of some blocks of a frozen backbone.

    Args:
        feature_model: a backbone; put into evaluation mode.
        n: the last n blocks, or the indices of blocks.
        autocast_ctx: makes the context that the backbone runs in.
        reshape: return patch tokens as maps [B, D, H, W].
        return_class_token: return pairs of patch tokens and class token.
        norm: apply the backbone's final norm to every block (a ConvNeXt has one for its last stage only).
    """

    feature_model: Any

    def __init__(
        self,
        feature_model: nn.Module,
        n: int | Sequence[int],
        autocast_ctx: Callable[[], AbstractContextManager[Any]],
        reshape: bool = False,
        return_class_token: bool = True,
        *,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.feature_model = feature_model.eval()
        self.n = n
        self.autocast_ctx = autocast_ctx
        self.reshape = reshape
        self.return_class_token = return_class_token
        self.norm = norm

    def forward(self, images: Tensor) -> tuple[Any, ...]:
        """Return for each block, shallow to deep, (patch tokens [B, P, D], class token [B, D]), or only patch tokens.

        The outputs are inference tensors: clone them before autograd sees them.
        """
        # A user's own backbone may lack the argument, so it is passed only where it departs from the default.
        options = {} if self.norm else {"norm": False}
        with torch.inference_mode(), self.autocast_ctx():
            return self.feature_model.get_intermediate_layers(
                images, n=self.n, reshape=self.reshape, return_class_token=self.return_class_token, **options
            )
