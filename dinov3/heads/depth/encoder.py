"""A frozen backbone as the encoder of a dense head: maps and class tokens of some of its blocks.

Notable:
- The backbone stays in evaluation mode even if `train()` is called: in training mode its positions are rescaled at
  random, so two forwards of one image would differ.
- Its parameters take no gradients, so the maps come without a graph; gradients of the images still work.
"""

from __future__ import annotations

import logging
from enum import Enum
from typing import Any, Self

from torch import Tensor, nn

from dinov3.heads.backbone_layers import BackboneLayers, BackboneLayersSet, backbone_out_indices, backbone_widths
from dinov3.layers.patch_multiple import CenterPadding, Margins, StretchToMultiple
from dinov3.utils.messages import check_choice

__all__ = ["BackboneLayersSet", "DinoVisionTransformerWrapper", "PatchSizeAdaptationStrategy"]

logger = logging.getLogger("dinov3")


class PatchSizeAdaptationStrategy(Enum):
    """What happens to images whose sides are not multiples of the patch."""

    CENTER_PADDING = "center_padding"
    STRETCH = "stretch"
    NO_ADAPTATION = "never"


class DinoVisionTransformerWrapper(nn.Module):
    """Return the maps of some blocks of a frozen backbone, from images of any size.

    Args:
        backbone_model: a ViT or ConvNeXt; put into evaluation mode, its parameters frozen.
        backbone_out_layers: which blocks: a `BackboneLayersSet`, its name, or indices.
        use_backbone_norm: apply the backbone's final norm to every level (a ConvNeXt has one for its last stage only).
        adapt_to_patch_size: what to do with sides that are not multiples: a strategy, or the name or value of one.

    Attributes:
        backbone: `backbone_model`.
        backbone_out_indices: the blocks, from 0.
        embed_dims: channels of each level, in the order of the blocks.
        final_norm: `use_backbone_norm`.
        patch_size_adapter: makes sides multiples of what the backbone wants.

    Raises:
        ValueError: there are no such blocks, or there is no such strategy.
    """

    backbone: Any
    patch_size_adapter: nn.Module

    def __init__(
        self,
        backbone_model: nn.Module,
        backbone_out_layers: BackboneLayers,
        use_backbone_norm: bool = False,
        adapt_to_patch_size: PatchSizeAdaptationStrategy | str = PatchSizeAdaptationStrategy.CENTER_PADDING,
    ) -> None:
        super().__init__()
        self.backbone = backbone_model.requires_grad_(False).eval()
        self.backbone_out_indices = backbone_out_indices(backbone_model, backbone_out_layers)
        self.embed_dims = backbone_widths(backbone_model, sorted(self.backbone_out_indices))
        self.final_norm = use_backbone_norm
        self.multiple = int(getattr(backbone_model, "input_pad_size", None) or self.backbone.patch_size)
        self.patch_size_adapter = _make_adapter(adapt_to_patch_size, self.multiple)
        logger.debug("levels of %s channels; sides as multiples of %d", self.embed_dims, self.multiple)

    def train(self, mode: bool = True) -> Self:
        """Keep the backbone in evaluation mode, because nothing is trained here."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Map normalised images [B, 3, H, W] to (map [B, C, h, w], class token [B, C]) of each level, shallow first."""
        levels = self.backbone.get_intermediate_layers(
            self.patch_size_adapter(x),
            n=self.backbone_out_indices,
            reshape=True,
            return_class_token=True,
            norm=self.final_norm,
        )
        return list(levels)

    def margins(self, height: int, width: int) -> Margins:
        """Return what the backbone sees beyond an image of this size: (top, bottom, left, right), in pixels.

        Without adaptation it does not see the last rows and columns, so bottom and right are negative.
        """
        if isinstance(self.patch_size_adapter, CenterPadding):
            return self.patch_size_adapter.margins(height, width)
        if isinstance(self.patch_size_adapter, StretchToMultiple):
            return 0, 0, 0, 0
        return 0, -(height % self.multiple), 0, -(width % self.multiple)


def _make_adapter(strategy: PatchSizeAdaptationStrategy | str, multiple: int) -> nn.Module:
    if not isinstance(strategy, PatchSizeAdaptationStrategy):
        by_text = {text: member for member in PatchSizeAdaptationStrategy for text in (member.name, member.value)}
        if strategy not in by_text:
            check_choice("adapt_to_patch_size", strategy, PatchSizeAdaptationStrategy.__members__)
        strategy = by_text[strategy]
    if strategy is PatchSizeAdaptationStrategy.CENTER_PADDING:
        return CenterPadding(multiple)
    return StretchToMultiple(multiple) if strategy is PatchSizeAdaptationStrategy.STRETCH else nn.Identity()
