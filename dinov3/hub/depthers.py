"""The published depth models by name: DPT heads on frozen backbones (arXiv 2508.10104, section 6.3).

Notable:
- Images are normalised as `hub.transforms.normalization_of` says for the weights of the head, not of the backbone.
- `Depther.predict` returns the depth pixel by pixel; calling the model, that of the padded image.
- The precision is the model's own, see `autocast_dtype`: an autocast region around the call changes nothing.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor

from dinov3.heads.depth.depther import DecoderConfig, Depther, make_depther_from_config
from dinov3.hub import backbones
from dinov3.hub.backbones import Weights, WeightsLike
from dinov3.hub.head_weights import choose_weights, load_head
from dinov3.hub.sources import BASE_URL

__all__ = ["DepthWeights", "dinov3_vit7b16_dd", "dinov3_vitl16_chmv2"]


class DepthWeights(Enum):
    """The data that published heads were trained on."""

    CHMV2 = "CHMV2"  # canopy height
    SYNTHMIX = "SYNTHMIX"  # synthetic indoor and outdoor scenes


DepthWeightsLike = DepthWeights | str | os.PathLike[str] | Mapping[str, Tensor]


@dataclass(frozen=True)
class PublishedDepther:
    """One entry of the hub.

    Attributes:
        backbone: its entry.
        weights: the data that the head was trained on.
        file: of the head below the base URL, before the hash.
        file_hash: first digits of its SHA-256.
        config: the head and what it sees.
        has_depth_range: whether users may choose the range of depths.
    """

    backbone: str
    weights: DepthWeights
    file: str
    file_hash: str
    config: dict[str, Any]
    has_depth_range: bool = False


PUBLISHED = {
    "dinov3_vit7b16_dd": PublishedDepther(
        backbone="dinov3_vit7b16",
        weights=DepthWeights.SYNTHMIX,
        file="dinov3_vit7b16/dinov3_vit7b16_synthmix_dpt_head",
        file_hash="02040be1",
        config={
            "type": "dpt",
            "min_depth": 0.001,
            "max_depth": 100.0,
            "backbone_out_layers": [9, 19, 29, 39],
            "use_batchnorm": True,
            "use_cls_token": False,
            "head_kwargs": {"channels": 512, "post_process_channels": [2048, 2048, 2048, 2048]},
        },
        has_depth_range=True,
    ),
    "dinov3_vitl16_chmv2": PublishedDepther(
        backbone="dinov3_vitl16",
        weights=DepthWeights.CHMV2,
        file="chmv2/dinov3_vitl16_chmv2_dpt_head",
        file_hash="3703d643",
        config={
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
    ),
}

_ARGUMENTS = """

    Args:
        pretrained: load both weights; if False, initialise at random and read nothing.
        weights: of the head: `DepthWeights.{weights}`, or its name; or a local path, read where it lies (keep it in
            place while the model lives), a file:// or https:// URL of a file, or a state dict. A published head, the
            head that a training saved, or the state dict of a whole depther will do.
        backbone_weights: of the backbone, as `weights=` of `{backbone}`.
        check_hash: compare both files with the SHA-256 digits at the end of their names.
        autocast_dtype: what backbone and head compute in; float32 means that autocast is off, also where a caller's
            region surrounds the call. Depths are made in float32 and come in float32.
        **kwargs: as for `{backbone}`, e.g. `device` and `dtype`, which hold for the head too; `hash` chooses another
            published head{more}.

    Returns:
        A `Depther` in evaluation mode, its backbone frozen, its head trainable, on the CPU unless `device` is given.

    Raises:
        FileNotFoundError: there is no such local file.
        ValueError: there are no such published weights, or a file is not a checkpoint of its part of this model.
        ConnectionError: a download failed.
        TypeError: an unknown keyword, or one that this model fixes.
    """


Entry = TypeVar("Entry", bound=Callable[..., Any])


def _with_arguments_documented(entry: Entry) -> Entry:
    published = PUBLISHED[entry.__name__]
    more = "; `depth_range=(first, last)`: centres of the outer bins, in metres" if published.has_depth_range else ""
    arguments = _ARGUMENTS.format(weights=published.weights.name, backbone=published.backbone, more=more)
    entry.__doc__ = (entry.__doc__ or "") + arguments
    return entry


@_with_arguments_documented
def dinov3_vit7b16_dd(
    *,
    pretrained: bool = True,
    weights: DepthWeightsLike = DepthWeights.SYNTHMIX,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Depther:
    """DINOv3 ViT-7B/16 with its depth head: images, normalised as for ImageNet, to metres in 0.001 .. 100."""
    return _make_depther("dinov3_vit7b16_dd", pretrained, weights, backbone_weights, check_hash, autocast_dtype, kwargs)


@_with_arguments_documented
def dinov3_vitl16_chmv2(
    pretrained: bool = True,
    weights: DepthWeightsLike = DepthWeights.CHMV2,
    backbone_weights: WeightsLike = Weights.SAT493M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Depther:
    """DINOv3 ViT-L/16 with the head CHMv2: satellite images, in a normalisation of their own, to metres of canopy."""
    return _make_depther(
        "dinov3_vitl16_chmv2", pretrained, weights, backbone_weights, check_hash, autocast_dtype, kwargs
    )


def config_of(entry: str) -> DecoderConfig:
    """The head of a published depther and what it sees.

    Args:
        entry: name of the hub entry.
    """
    return DecoderConfig(**copy.deepcopy(PUBLISHED[entry].config))


def head_url_of(entry: str, *, file_hash: str | None = None) -> str:
    """Where the head of a published depther is.

    Args:
        entry: name of the hub entry.
        file_hash: first digits of the SHA-256 in the file name; None: those of the published file.
    """
    return f"{BASE_URL}/{PUBLISHED[entry].file}-{file_hash or PUBLISHED[entry].file_hash}.pth"


def _make_depther(
    entry: str,
    pretrained: bool,
    weights: DepthWeightsLike,
    backbone_weights: WeightsLike,
    check_hash: bool,
    autocast_dtype: torch.dtype,
    kwargs: dict[str, Any],
) -> Depther:
    published, target, config = PUBLISHED[entry], f"the head of {entry}", config_of(entry)
    file_hash = kwargs.pop("hash", None)
    if published.has_depth_range:
        config.min_depth, config.max_depth = _checked_range(kwargs.pop("depth_range", None), config)
    chosen = choose_weights(
        target, weights, DepthWeights, available=(published.weights,), pretrained=pretrained, file_hash=file_hash
    )
    backbone = getattr(backbones, published.backbone)(
        pretrained=pretrained, weights=backbone_weights, check_hash=check_hash, **kwargs
    )
    like: Tensor = backbone.cls_token
    depther = make_depther_from_config(
        backbone, config, autocast_dtype=autocast_dtype, head_device="meta" if pretrained else like.device
    )
    depther.decoder.to(like.dtype)
    if pretrained:
        if isinstance(chosen, DepthWeights):
            chosen = head_url_of(entry, file_hash=file_hash)
        load_head(
            depther.decoder,
            chosen,
            target=target,
            prefix="decoder.",
            device=like.device,
            check_hash=check_hash,
            options=kwargs,
        )
    return depther


def _checked_range(depth_range: Any, config: DecoderConfig) -> tuple[float, float]:
    if depth_range is None:
        return config.min_depth, config.max_depth
    try:
        first, last = map(float, depth_range)
    except (TypeError, ValueError) as error:
        raise ValueError(f"depth_range={depth_range!r}: expected two depths in metres, e.g. (0.001, 20.0)") from error
    return first, last
