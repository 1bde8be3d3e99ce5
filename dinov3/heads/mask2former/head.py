"""The Mask2Former head (arXiv 2112.01527): a pixel decoder, and queries that predict a class and a mask each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dinov3.heads.mask2former.mask_decoder import MaskDecoder
from dinov3.heads.mask2former.pixel_decoder import ENCODED_LEVELS, FINEST_LEVEL, N_GROUPS, PixelDecoder
from dinov3.layers.resizing import resize_bilinear


class Mask2FormerHead(nn.Module):
    """Predict classes and masks of queries from a pyramid of maps.

    The defaults are those of the published head. A small one, for a small backbone and few images, might have
    `hidden_dim=256, ffn_dim=1024, n_encoder_layers=3, n_decoder_layers=6`.

    Args:
        input_shape: for the levels `"1"` (stride 4) to `"4"` (stride 32) their channels, alone or first in a list.
        hidden_dim: D.
        num_classes: K, without "no object".
        loss_weight: without effect; published code passes it.
        ignore_value: label of pixels that a training leaves out; kept for it.
        transformer_in_feature: without effect; published code passes it.
        mask_dim: width of the mask features. Default: D.
        n_queries: Q.
        n_heads: of all attentions.
        n_points: of deformable attentions, for each head and level.
        ffn_dim: hidden width of all feed-forward networks.
        n_encoder_layers: of the pixel decoder.
        n_decoder_layers: of the mask decoder.

    Raises:
        ValueError: a level is missing, or `hidden_dim` is not a multiple of 32, of 4 and of `n_heads`.
    """

    def __init__(
        self,
        input_shape: Mapping[str, int | Sequence[int]],
        hidden_dim: int = 2048,
        num_classes: int = 150,
        loss_weight: float = 1.0,
        ignore_value: int = -1,
        transformer_in_feature: str = "multi_scale_pixel_decoder",
        *,
        mask_dim: int | None = None,
        n_queries: int = 100,
        n_heads: int = 16,
        n_points: int = 4,
        ffn_dim: int = 4096,
        n_encoder_layers: int = 6,
        n_decoder_layers: int = 9,
    ) -> None:
        super().__init__()
        levels = (*ENCODED_LEVELS, FINEST_LEVEL)
        if missing := [level for level in levels if level not in input_shape]:
            raise ValueError(f"input_shape lacks the levels {missing}: expected the channels of {sorted(levels)}")
        for name, divisor in {"32 (groups of its norms)": N_GROUPS, f"n_heads={n_heads}": n_heads}.items():
            if hidden_dim % divisor or hidden_dim < 1:
                raise ValueError(f"hidden_dim={hidden_dim}: expected a multiple of {name}")
        self.num_classes = num_classes
        self.ignore_value = ignore_value
        self.pixel_decoder = PixelDecoder(
            {level: _channels(input_shape[level]) for level in levels},
            hidden_dim,
            mask_dim or hidden_dim,
            n_heads=n_heads,
            n_points=n_points,
            ffn_dim=ffn_dim,
            n_layers=n_encoder_layers,
        )
        self.predictor = MaskDecoder(
            hidden_dim,
            hidden_dim,
            num_classes,
            mask_dim or hidden_dim,
            n_queries=n_queries,
            n_heads=n_heads,
            ffn_dim=ffn_dim,
            n_layers=n_decoder_layers,
        )

    def forward(self, features: dict[str, Tensor]) -> dict[str, Any]:
        """Predict from maps [B, C, H/4, W/4] to [B, C, H/32, W/32] of the levels `"1"` to `"4"`.

        Returns:
            `pred_logits` [B, Q, K + 1], whose last class is "no object"; `pred_masks`, logits [B, Q, H/4, W/4]; and
            `aux_outputs`, the predictions before these, from the first: a list of such dictionaries.
        """
        mask_features, maps = self.pixel_decoder(features)
        *earlier, last = self.predictor(maps, mask_features)
        return {**last, "aux_outputs": earlier}

    def predict(
        self, features: dict[str, Tensor], mask: Any = None, rescale_to: Sequence[int] = (512, 512)
    ) -> dict[str, Tensor]:
        """Compute the last prediction of `forward`, with masks (logits) resized to `rescale_to` (height, width).

        Args:
            features: see `forward`.
            mask: without effect; published code passes it.
            rescale_to: of the masks.

        Returns:
            `pred_logits` [B, Q, K + 1] and `pred_masks` [B, Q, *rescale_to].
        """
        mask_features, maps = self.pixel_decoder(features)
        (last,) = self.predictor(maps, mask_features, only_last=True)
        return {**last, "pred_masks": resize_bilinear(last["pred_masks"], rescale_to)}


def _channels(shape: int | Sequence[int]) -> int:
    return shape if isinstance(shape, int) else int(shape[0])
