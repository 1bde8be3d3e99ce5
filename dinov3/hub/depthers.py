"""The published depth models by name: DPT heads on frozen backbones (arXiv 2508.10104, section 6.3).

Notable:
- Images are normalised as `hub.transforms.normalization_of` says for the weights of the head, not of the backbone.
- `Depther.predict` returns the depth of each pixel; calling the model, that of the padded image.
- The precision is the model's own, see `autocast_dtype`: an autocast region around the call changes nothing.
"""

from __future__ import annotations

import copy
from enum import Enum
from functools import partial
from typing import Any

import torch

from dinov3.heads.depth.depther import DecoderConfig, Depther, make_depther_from_config
from dinov3.hub.backbones import Weights, WeightsLike
from dinov3.hub.head_weights import PublishedHead, document_arguments, load_published
from dinov3.hub.sources import Source

__all__ = ["DepthWeights", "dinov3_vit7b16_dd", "dinov3_vitl16_chmv2"]


class DepthWeights(Enum):
    """The data that published heads were trained on."""

    CHMV2 = "CHMV2"  # canopy height
    SYNTHMIX = "SYNTHMIX"  # synthetic indoor and outdoor scenes


SYNTHMIX = PublishedHead(
    entry="dinov3_vit7b16_dd",
    backbone="dinov3_vit7b16",
    weights=DepthWeights.SYNTHMIX,
    file="dinov3_vit7b16/dinov3_vit7b16_synthmix_dpt_head",
    file_hash="02040be1",
    module="decoder",
)
CHMV2 = PublishedHead(
    entry="dinov3_vitl16_chmv2",
    backbone="dinov3_vitl16",
    weights=DepthWeights.CHMV2,
    file="chmv2/dinov3_vitl16_chmv2_dpt_head",
    file_hash="3703d643",
    module="decoder",
)
PUBLISHED = {head.entry: head for head in (SYNTHMIX, CHMV2)}
CONFIGS: dict[str, dict[str, Any]] = {
    "dinov3_vit7b16_dd": {
        "type": "dpt",
        "min_depth": 0.001,
        "max_depth": 100.0,
        "backbone_out_layers": [9, 19, 29, 39],
        "use_batchnorm": True,
        "use_cls_token": False,
        "head_kwargs": {"channels": 512, "post_process_channels": [2048, 2048, 2048, 2048]},
    },
    "dinov3_vitl16_chmv2": {
        "type": "dpt",
        "min_depth": 0.001,
        "max_depth": 96.0,
        "bins_strategy": "chmv2_mixlog",
        "norm_strategy": "chmv2_mixlog",
        "backbone_out_layers": [5, 11, 17, 23],
        "use_batchnorm": False,
        "use_cls_token": True,
        "head_kwargs": {"n_hidden_channels": 128, "use_bias": True, "projection_after_fusion": False},
    },
}

_document = partial(
    document_arguments,
    arguments="""
        autocast_dtype: what backbone and head compute in; float32 turns autocast off, even if the caller is in a region
            of it. Depths are computed and returned in float32.""",
    returns="`Depther` with a frozen backbone and a trainable head",
)


@_document(SYNTHMIX, keywords="; `depth_range=(first, last)` sets the centres of the outer bins, in metres")
def dinov3_vit7b16_dd(
    *,
    pretrained: bool = True,
    weights: DepthWeights | Source = DepthWeights.SYNTHMIX,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Depther:
    """DINOv3 ViT-7B/16 with its depth head: images, normalised as for ImageNet, to metres in 0.001 .. 100."""
    config = config_of("dinov3_vit7b16_dd")
    depth_range = kwargs.pop("depth_range", None)
    if depth_range is not None:
        try:
            config.min_depth, config.max_depth = map(float, depth_range)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"depth_range={depth_range!r}: expected two depths in metres, e.g. (0.001, 20.0)"
            ) from error
    return load_published(
        SYNTHMIX,
        partial(make_depther_from_config, config=config, autocast_dtype=autocast_dtype),
        pretrained=pretrained,
        weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        **kwargs,
    )


@_document(CHMV2)
def dinov3_vitl16_chmv2(
    pretrained: bool = True,
    weights: DepthWeights | Source = DepthWeights.CHMV2,
    backbone_weights: WeightsLike = Weights.SAT493M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Depther:
    """DINOv3 ViT-L/16 with the CHMv2 head: satellite images, in their own normalisation, to metres of canopy."""
    config = config_of("dinov3_vitl16_chmv2")
    return load_published(
        CHMV2,
        partial(make_depther_from_config, config=config, autocast_dtype=autocast_dtype),
        pretrained=pretrained,
        weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        **kwargs,
    )


def config_of(entry: str) -> DecoderConfig:
    """Return a fresh copy of the configuration of a published head, given the name of its hub entry."""
    return DecoderConfig(**copy.deepcopy(CONFIGS[entry]))
