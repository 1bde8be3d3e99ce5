"""The published classifier by name: a linear layer on a frozen backbone (arXiv 2508.10104, section 6.2.1).

Notable: the layer sees the class token and the mean of the patch tokens, in this order, both after the final norm.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.hub.backbones import Weights, WeightsLike
from dinov3.hub.head_weights import PublishedHead, document_arguments, load_published
from dinov3.hub.sources import Source
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer

__all__ = ["ClassifierWeights", "dinov3_vit7b16_lc"]

N_CLASSES = 1000
INIT_STD = 0.01


class ClassifierWeights(Enum):
    """The data whose classes a published head distinguishes."""

    IMAGENET1K = "IMAGENET1K"


PUBLISHED = PublishedHead(
    entry="dinov3_vit7b16_lc",
    backbone="dinov3_vit7b16",
    weights=ClassifierWeights.IMAGENET1K,
    file="dinov3_vit7b16/dinov3_vit7b16_imagenet1k_linear_head",
    file_hash="90d8ed92",
    module="linear_head",
)


class _LinearClassifierWrapper(nn.Module):
    """A backbone, and one linear layer on its class token and mean patch token.

    Args:
        backbone: its `forward_features` returns `x_norm_clstoken` [B, D] and `x_norm_patchtokens` [B, N, D].
        linear_head: from 2 D features to the logits of the classes.
    """

    backbone: DinoVisionTransformer | ConvNeXt

    def __init__(self, *, backbone: DinoVisionTransformer | ConvNeXt, linear_head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear_head = linear_head

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised floating-point images [B, 3, H, W] to logits [B, classes]."""
        features: Any = self.backbone.forward_features(x)
        mean_patch = features["x_norm_patchtokens"].mean(dim=1)  # [B, D]
        return self.linear_head(torch.cat([features["x_norm_clstoken"], mean_patch], dim=1))


@document_arguments(PUBLISHED, returns="module of `backbone` and `linear_head`, both trainable")
def dinov3_vit7b16_lc(
    *,
    pretrained: bool = True,
    weights: ClassifierWeights | Source = ClassifierWeights.IMAGENET1K,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    check_hash: bool = False,
    **kwargs: Any,
) -> _LinearClassifierWrapper:
    """DINOv3 ViT-7B/16 with its linear classifier of ImageNet-1k: images to 1000 logits."""
    return load_published(
        PUBLISHED,
        _build,
        pretrained=pretrained,
        weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        **kwargs,
    )


def _build(backbone: DinoVisionTransformer, *, head_device: torch.device) -> _LinearClassifierWrapper:
    linear = nn.Linear(2 * backbone.embed_dim, N_CLASSES, device=head_device)
    if head_device.type != "meta":
        nn.init.normal_(linear.weight, std=INIT_STD)
        nn.init.zeros_(linear.bias)
    return _LinearClassifierWrapper(backbone=backbone, linear_head=linear)
