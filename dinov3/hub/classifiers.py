"""The published classifier by name: a linear layer on a frozen backbone (arXiv 2508.10104, section 6.2.1).

Notable: the layer sees the class token and the mean of the patch tokens, in this order, both after the final norm.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.hub import backbones
from dinov3.hub.backbones import Weights, WeightsLike
from dinov3.hub.head_weights import choose_weights, load_head
from dinov3.hub.sources import BASE_URL
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer

__all__ = ["ClassifierWeights", "dinov3_vit7b16_lc"]

INIT_STD = 0.01


class ClassifierWeights(Enum):
    """The data whose classes a published head tells apart."""

    IMAGENET1K = "IMAGENET1K"


ClassifierWeightsLike = ClassifierWeights | str | os.PathLike[str] | Mapping[str, Tensor]

N_CLASSES = {"IMAGENET1K": 1000}
#: First digits of the SHA-256 of each published head, by backbone and data.
HASHES = {"dinov3_vit7b16": {"IMAGENET1K": "90d8ed92"}}


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
        """Images [B, 3, H, W], normalised floating point, to logits [B, classes]."""
        features: Any = self.backbone.forward_features(x)
        mean_patch = features["x_norm_patchtokens"].mean(dim=1)  # [B, D]
        return self.linear_head(torch.cat([features["x_norm_clstoken"], mean_patch], dim=1))


def dinov3_vit7b16_lc(
    *,
    pretrained: bool = True,
    weights: ClassifierWeightsLike = ClassifierWeights.IMAGENET1K,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    check_hash: bool = False,
    **kwargs: Any,
) -> _LinearClassifierWrapper:
    """DINOv3 ViT-7B/16 with its linear classifier of ImageNet-1k: images to 1000 logits.

    Args:
        pretrained: load both weights; if False, initialise at random and read nothing.
        weights: of the linear layer: `ClassifierWeights.IMAGENET1K`, or its name; or a local path, a file:// or
            https:// URL of a file, or a state dict, with the entries `weight` [1000, 8192] and `bias` [1000].
        backbone_weights: of the backbone, as `weights=` of `dinov3_vit7b16`.
        check_hash: compare both files with the SHA-256 digits at the end of their names.
        **kwargs: as for `dinov3_vit7b16`, e.g. `device` and `dtype`, which hold for the linear layer too; `hash`
            chooses another published linear layer.

    Returns:
        A module in evaluation mode, its parameters trainable, on the CPU unless `device` is given. Its parts are
        `backbone` and `linear_head`.

    Raises:
        FileNotFoundError: there is no such local file.
        ValueError: there are no such published weights, or a file is not a checkpoint of its part of this model.
        ConnectionError: a download failed.
        TypeError: an unknown keyword, or one that this model fixes.
    """
    return _make_linear_classifier("dinov3_vit7b16", pretrained, weights, backbone_weights, check_hash, kwargs)


def head_url_of(backbone: str, weights: ClassifierWeights, *, file_hash: str | None = None) -> str:
    """Where the published head of a backbone is.

    Args:
        backbone: name of the backbone's hub entry.
        weights: the data that the head was trained on.
        file_hash: first digits of the SHA-256 in the file name; None: those of the published file.
    """
    file_hash = file_hash or HASHES[backbone][weights.name]
    return f"{BASE_URL}/{backbone}/{backbone}_{weights.name.lower()}_linear_head-{file_hash}.pth"


def _make_linear_classifier(
    backbone: str,
    pretrained: bool,
    weights: ClassifierWeightsLike,
    backbone_weights: WeightsLike,
    check_hash: bool,
    kwargs: dict[str, Any],
) -> _LinearClassifierWrapper:
    assert backbone in HASHES, f"no linear classifier was published for {backbone}, only for {', '.join(HASHES)}"
    target = f"the linear head of {backbone}_lc"
    file_hash = kwargs.pop("hash", None)
    chosen = choose_weights(
        target,
        weights,
        ClassifierWeights,
        available=tuple(ClassifierWeights),
        pretrained=pretrained,
        file_hash=file_hash,
    )
    model = getattr(backbones, backbone)(
        pretrained=pretrained, weights=backbone_weights, check_hash=check_hash, **kwargs
    )
    like = model.cls_token
    n_classes = N_CLASSES[ClassifierWeights.IMAGENET1K.name]
    place = "meta" if pretrained else like.device
    head = nn.Linear(2 * model.embed_dim, n_classes, device=place, dtype=like.dtype)
    if pretrained:
        if isinstance(chosen, ClassifierWeights):
            chosen = head_url_of(backbone, chosen, file_hash=file_hash)
        load_head(
            head,
            chosen,
            target=target,
            prefix="linear_head.",
            device=like.device,
            check_hash=check_hash,
            options=kwargs,
        )
    elif not head.weight.is_meta:
        nn.init.normal_(head.weight, std=INIT_STD)
        nn.init.zeros_(head.bias)
    return _LinearClassifierWrapper(backbone=model, linear_head=head).eval()
