"""Semantic segmentation models: a frozen backbone and a head, wired into one module (arXiv 2508.10104, section 6.1).

Notable:
- `forward` returns logits at patch resolution, for training; `predict` returns them at any size.
- Only the head learns: the backbone's parameters are frozen, and it stays in evaluation mode even if `train()` is
  called.
- A patch embedding drops the last rows and columns of sides that are not multiples of the patch, and `predict` then
  stretches the rest over the whole size, as published. With `pad_to_patch_multiple` every pixel is seen, and lies where
  it should.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from dinov3.heads.backbone_layers import BackboneLayers, BackboneLayersSet, backbone_out_indices, backbone_widths
from dinov3.heads.linear import LinearSegmentationHead
from dinov3.heads.precision import autocast_to
from dinov3.layers.patch_multiple import CenterPadding, cut_margins
from dinov3.layers.resizing import resize_bilinear
from dinov3.models.intermediate_layers import ModelWithIntermediateLayers
from dinov3.models.summary import patch_stride

__all__ = ["BackboneLayersSet", "FeatureDecoder", "FrozenBackbone", "build_segmentation_decoder"]


class FrozenBackbone(ModelWithIntermediateLayers):
    """Return the maps of some blocks of a backbone that is not trained, shallow to deep.

    Args:
        feature_model: a ViT or ConvNeXt; put into evaluation mode, its parameters frozen.
        n: the indices of blocks.
        norm: see `ModelWithIntermediateLayers`.
        return_class_token: return pairs of map and class token.
    """

    def __init__(
        self, feature_model: nn.Module, n: Sequence[int], *, norm: bool = True, return_class_token: bool = False
    ) -> None:
        feature_model.requires_grad_(False)
        # No context of its own, because the autocast of the whole model applies here, too.
        super().__init__(feature_model, list(n), nullcontext, True, return_class_token, norm=norm)

    def train(self, mode: bool = True) -> Self:
        """Keep the backbone in evaluation mode, because nothing is trained here."""
        super().train(mode)
        self.feature_model.eval()
        return self


class FeatureDecoder(nn.Module):
    """A backbone and a head, called one after the other.

    Args:
        segmentation_model: [backbone, head]; the head takes what the backbone returns, and has
            `predict(features, rescale_to=(height, width))`.
        autocast_ctx: makes the context that both run in. Default: autocast of `autocast_dtype` on the images' device.
        autocast_dtype: float32 means no autocast.
        patch_multiple: `predict` pads images with zeros to multiples of this many pixels, and cuts the margins off its
            result; 1 pads nothing.
    """

    segmentation_model: Any

    def __init__(
        self,
        segmentation_model: nn.ModuleList,
        autocast_ctx: Callable[[], AbstractContextManager[Any]] | None = None,
        *,
        autocast_dtype: torch.dtype = torch.float32,
        patch_multiple: int = 1,
    ) -> None:
        super().__init__()
        self.segmentation_model = segmentation_model
        self.autocast_ctx = autocast_ctx
        self.autocast_dtype = autocast_dtype
        self.padding = CenterPadding(patch_multiple)

    def forward(self, x: Tensor) -> Any:
        """Map normalised images [B, 3, H, W] to what the head returns: a linear one, logits [B, K, h, w] of patches."""
        with self._autocast(x.device):
            features = self.segmentation_model[0](x)
            return self.segmentation_model[1](features)

    @torch.inference_mode()
    def predict(self, x: Tensor, rescale_to: Sequence[int] = (512, 512)) -> Any:
        """Predict what the head predicts, as inference tensors.

        Args:
            x: images [B, 3, H, W], normalised.
            rescale_to: (height, width) of the result, in pixels.

        Returns:
            With a linear head, logits [B, K, *rescale_to].
        """
        margins = self.padding.margins(*x.shape[-2:])
        with self._autocast(x.device):
            features = self.segmentation_model[0](self.padding(x))
            if not any(margins):
                return self.segmentation_model[1].predict(features, rescale_to=rescale_to)
            height, width = x.shape[-2] + sum(margins[:2]), x.shape[-1] + sum(margins[2:])
            logits = self.segmentation_model[1].predict(features, rescale_to=(height, width))
            return resize_bilinear(cut_margins(logits, margins), rescale_to)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.autocast_ctx is not None:
            return self.autocast_ctx()
        return autocast_to(device.type, self.autocast_dtype)


def build_segmentation_decoder(
    backbone_model: nn.Module,
    backbone_out_layers: BackboneLayers = BackboneLayersSet.FOUR_EVEN_INTERVALS,
    decoder_type: str = "linear",
    hidden_dim: int = 2048,
    num_classes: int = 150,
    dropout: float = 0.1,
    autocast_dtype: torch.dtype = torch.float32,
    *,
    use_batchnorm: bool = True,
    use_cls_token: bool = False,
    use_backbone_norm: bool = True,
    pad_to_patch_multiple: bool = False,
) -> FeatureDecoder:
    """Build a segmentation model of a backbone and a new head.

    Args:
        backbone_model: a ViT or ConvNeXt; put into evaluation mode, its parameters frozen.
        backbone_out_layers: which blocks the head reads: a `BackboneLayersSet`, its name, or indices.
        decoder_type: `"linear"`. `"m2f"`, the published Mask2Former head, is not implemented yet.
        hidden_dim: width of a `"m2f"` head; not used by a linear one.
        num_classes: K.
        dropout: share of the channels that training drops.
        autocast_dtype: what the model runs in; float32 means no autocast.
        use_batchnorm: the head normalises its channels first.
        use_cls_token: the head also sees each level's class token.
        use_backbone_norm: apply the backbone's final norm to every level.
        pad_to_patch_multiple: let `predict` see the last rows and columns of images whose sides are not multiples of
            the patch (of 32 pixels, for a ConvNeXt).

    Returns:
        A model on the backbone's device. Its entries are `segmentation_model.0.feature_model.*` and
        `segmentation_model.1.*`; only the latter are trainable.

    Raises:
        NotImplementedError: `decoder_type` is `"m2f"`.
        ValueError: another decoder, or there are no such blocks.
    """
    if decoder_type == "m2f":
        raise NotImplementedError("decoder_type='m2f': the Mask2Former head is not implemented yet, only 'linear'")
    if decoder_type != "linear":
        raise ValueError(f"decoder_type={decoder_type!r}: expected 'linear'")
    # Levels come in the order of the blocks, however they are listed.
    indices = sorted(backbone_out_indices(backbone_model, backbone_out_layers))
    head = LinearSegmentationHead(
        backbone_widths(backbone_model, indices),
        num_classes,
        use_batchnorm=use_batchnorm,
        use_cls_token=use_cls_token,
        dropout=dropout,
    )
    backbone = FrozenBackbone(backbone_model, indices, norm=use_backbone_norm, return_class_token=use_cls_token)
    return FeatureDecoder(
        nn.ModuleList([backbone, head.to(next(backbone_model.parameters()).device)]),
        autocast_dtype=autocast_dtype,
        patch_multiple=patch_stride(backbone_model) if pad_to_patch_multiple else 1,
    )
