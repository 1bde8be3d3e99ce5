"""What the ViT and the ConvNeXt have in common: `forward`, and the checks of images and of chosen layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from dinov3.utils.integers import as_integers


class Backbone(nn.Module):
    """A backbone whose features are the dicts of `forward_features`."""

    forward_features: Any
    head: nn.Module
    n_blocks: int
    in_chans: int

    # Exporters name a model's inputs after the parameters, so each has a name and a default.
    def forward(self, x: Tensor | list[Tensor], masks: Any = None, is_training: bool = False) -> Any:
        """Return the features of `forward_features` if `is_training`, else the class token [B, D] (a list for a list).

        `is_training` has nothing to do with the mode of the module (`train`, `eval`).
        """
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, list):
            return [self.head(entry["x_norm_clstoken"]) for entry in features]
        return self.head(features["x_norm_clstoken"])

    def _check_images(self, x: Tensor, smallest_side: int) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans or not x.is_floating_point():
            raise ValueError(
                f"expected floating-point images [batch, {self.in_chans}, height, width], "
                f"got {x.dtype} of shape {list(x.shape)}"
            )
        if min(x.shape[-2:]) < smallest_side:
            raise ValueError(f"images need sides of at least {smallest_side} pixels, got {list(x.shape)}")

    def _layer_indices(self, n: int | Sequence[int]) -> list[int]:
        """Return in ascending order the indices of the last n blocks (stages of a ConvNeXt), or those that n lists."""
        try:
            indices = sorted(as_integers(n))
        except TypeError:
            indices = []
        if indices and not isinstance(n, Iterable):
            indices = list(range(self.n_blocks - indices[0], self.n_blocks))
        if not indices or indices[0] < 0 or indices[-1] >= self.n_blocks or len(set(indices)) != len(indices):
            raise ValueError(
                f"n must be a number of layers from 1 to {self.n_blocks}, "
                f"or different indices from 0 to {self.n_blocks - 1}, got {n!r}"
            )
        return indices

    @staticmethod
    def _pair_masks(x_list: Sequence[Tensor], masks: Sequence[Tensor | None] | None) -> list[tuple[Tensor, Any]]:
        masks = [None] * len(x_list) if masks is None else masks
        if len(masks) != len(x_list):
            raise ValueError(f"masks needs one entry (or None) for each input: got {len(masks)} for {len(x_list)}")
        return list(zip(x_list, masks, strict=True))
