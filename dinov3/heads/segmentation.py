"""Semantic segmentation models: a frozen backbone and a head, wired into one module (arXiv 2508.10104, section 6.1).

Notable:
- `forward` returns what the head predicts at its own resolution, for training; `predict` returns it at any size.
- Only the head learns: the backbone's parameters are frozen, and it stays in evaluation mode even if `train()` is
  called.
- A patch embedding drops the last rows and columns of sides that are not multiples of the patch, and `predict` then
  stretches the rest over the whole size, as published. With `pad_to_patch_multiple` every pixel is seen, and lies where
  it should.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from dinov3.heads.backbone_layers import BackboneLayers, BackboneLayersSet, backbone_out_indices, backbone_widths
from dinov3.heads.linear import LinearSegmentationHead
from dinov3.heads.mask2former.adapter import DINOv3_Adapter
from dinov3.heads.mask2former.head import Mask2FormerHead
from dinov3.heads.precision import autocast_to
from dinov3.layers.patch_multiple import CenterPadding, cut_margins
from dinov3.layers.resizing import resize_bilinear
from dinov3.models.intermediate_layers import ModelWithIntermediateLayers
from dinov3.models.summary import patch_stride
from dinov3.utils.messages import refuse_unknown_arguments

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
        """Map normalised images [B, 3, H, W] to what the head returns.

        A linear head returns logits [B, K, h, w] of patches; a Mask2Former head a dictionary, see
        `Mask2FormerHead.forward`, of images whose sides are multiples of 32.
        """
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
            With a linear head, logits [B, K, *rescale_to]; with a Mask2Former head a dictionary of `pred_logits`
            [B, Q, K + 1] and `pred_masks`, logits [B, Q, *rescale_to].
        """
        margins = self.padding.margins(*x.shape[-2:])
        with self._autocast(x.device):
            features = self.segmentation_model[0](self.padding(x))
            if not any(margins):
                return self.segmentation_model[1].predict(features, rescale_to=rescale_to)
            height, width = x.shape[-2] + sum(margins[:2]), x.shape[-1] + sum(margins[2:])
            prediction = self.segmentation_model[1].predict(features, rescale_to=(height, width))
            if isinstance(prediction, Mapping):
                masks = resize_bilinear(cut_margins(prediction["pred_masks"], margins), rescale_to)
                return {**prediction, "pred_masks": masks}
            return resize_bilinear(cut_margins(prediction, margins), rescale_to)

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
    drop_path: float = 0.3,
    head_device: torch.device | str | None = None,
    **head_options: Any,
) -> FeatureDecoder:
    """Build a segmentation model of a backbone and a new head, initialised at random.

    Args:
        backbone_model: a ViT or ConvNeXt; put into evaluation mode, its parameters frozen.
        backbone_out_layers: which blocks the head reads: a `BackboneLayersSet`, its name, or indices.
        decoder_type: `"linear"`, or `"m2f"`: a ViT-Adapter and a Mask2Former head, on four blocks of a ViT.
        hidden_dim: width of a `"m2f"` head.
        num_classes: K.
        dropout: share of the channels that training drops (linear head).
        autocast_dtype: what the model runs in; float32 means no autocast.
        use_batchnorm: normalise the channels first (linear head).
        use_cls_token: let the head see each level's class token (linear head).
        use_backbone_norm: apply the backbone's final norm to every level (linear head; `"m2f"` always does).
        pad_to_patch_multiple: let `predict` see the last rows and columns of images whose sides are not multiples of
            the patch (of 32 pixels, for a ConvNeXt). With `"m2f"` it always does, in multiples of 32.
        drop_path: share of the images whose feed-forward branches training drops in the adapter of a `"m2f"` head.
        head_device: where the head is built. Default: where the backbone is.
        **head_options: more arguments of `Mask2FormerHead`.

    Returns:
        A model. `segmentation_model.0` has the backbone, which is not trained, in `feature_model` (linear head) or
        `backbone` (`"m2f"`, where the rest of it is the adapter); `segmentation_model.1` is the head.

    Raises:
        TypeError: an option that this head does not have.
        ValueError: another decoder, there are no such blocks, or the head cannot read them.
    """
    # Levels come in the order of the blocks, however they are listed.
    indices = sorted(backbone_out_indices(backbone_model, backbone_out_layers))
    with torch.device(head_device or next(backbone_model.parameters()).device):
        if decoder_type == "m2f":
            adapter = DINOv3_Adapter(backbone_model, indices, drop_path_rate=drop_path).eval()
            shape = dict.fromkeys("1234", backbone_widths(backbone_model, indices)[0])
            head = Mask2FormerHead(shape, hidden_dim, num_classes, ignore_value=255, **head_options)
            parts, multiple = nn.ModuleList([adapter, head]), adapter.multiple
        elif decoder_type == "linear":
            refuse_unknown_arguments(LinearSegmentationHead, head_options)
            widths = backbone_widths(backbone_model, indices)
            linear = LinearSegmentationHead(widths, num_classes, use_batchnorm, use_cls_token, dropout)
            reader = FrozenBackbone(backbone_model, indices, norm=use_backbone_norm, return_class_token=use_cls_token)
            parts = nn.ModuleList([reader, linear])
            multiple = patch_stride(backbone_model) if pad_to_patch_multiple else 1
        else:
            raise ValueError(f"decoder_type={decoder_type!r}: expected 'linear' or 'm2f'")
    return FeatureDecoder(parts, autocast_dtype=autocast_dtype, patch_multiple=multiple)
