"""Small backbones and depthers, structured like the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.heads.depth.depther import DecoderConfig, Depther, make_depther_from_config
from dinov3.hub import depthers
from dinov3.hub.architectures import PUBLISHED, PublishedViT
from dinov3.models.vision_transformer import DinoVisionTransformer

BACKBONE = {
    "embed_dim": 32,
    "depth": 8,
    "num_heads": 2,
    "ffn_ratio": 2.0,
    "n_storage_tokens": 2,
    "layerscale_init": 1e-5,
    "norm_layer": "layernormbf16",
    "mask_k_bias": True,
    "pos_embed_rope_dtype": "fp32",
    "pos_embed_rope_rescale_coords": 2,
}
#: Like `dinov3_vit7b16_dd` and `dinov3_vitl16_chmv2`, and like the linear head of NYU.
CONFIGS: dict[str, dict[str, Any]] = {
    "dd": {
        "type": "dpt",
        "max_depth": 100.0,
        "backbone_out_layers": [1, 3, 5, 7],
        "n_output_channels": 32,
        "use_batchnorm": True,
        "head_kwargs": {"channels": 12, "post_process_channels": [8, 8, 8, 8], "n_hidden_channels": 6},
    },
    "chmv2": {
        "type": "dpt",
        "max_depth": 96.0,
        "bins_strategy": "chmv2_mixlog",
        "norm_strategy": "chmv2_mixlog",
        "backbone_out_layers": [1, 3, 5, 7],
        "n_output_channels": 32,
        "use_cls_token": True,
        "head_kwargs": {
            "channels": 12,
            "post_process_channels": [4, 6, 8, 10],
            "n_hidden_channels": 8,
            "use_bias": True,
            "projection_after_fusion": False,
        },
    },
    "linear": {"max_depth": 10.0, "backbone_out_layers": "LAST", "n_output_channels": 16, "use_batchnorm": True},
}


def tiny_backbone(**overrides: Any) -> DinoVisionTransformer:
    """A ViT whose training mode differs from its evaluation mode."""
    backbone = DinoVisionTransformer(**{**BACKBONE, **overrides})
    backbone.init_weights()
    randomise_(backbone)
    return backbone


def tiny_depther(kind: str = "dd", backbone: nn.Module | None = None, **kwargs: Any) -> Depther:
    """A depther in evaluation mode with random weights that let every part show in the depth.

    Args:
        kind: a key of `CONFIGS`.
        backbone: by default a `tiny_backbone`.
        **kwargs: more fields of `DecoderConfig`, or `autocast_dtype`.
    """
    dtype = kwargs.pop("autocast_dtype", torch.float32)
    torch.manual_seed(0)
    config = DecoderConfig(**{**CONFIGS[kind], **kwargs})
    depther = make_depther_from_config(backbone or tiny_backbone(), config, autocast_dtype=dtype)
    randomise_(depther.decoder)
    return depther


@torch.no_grad()
def randomise_(module: nn.Module) -> None:
    """Overwrite what constructors leave at zero or one: biases, norms, layer scales, running statistics."""
    for name, entry in module.state_dict().items():
        if entry.ndim == 1 and entry.is_floating_point() and not name.endswith(("periods", "bias_mask")):
            entry.uniform_(0.5, 1.5) if name.endswith(("weight", "gamma", "running_var")) else entry.normal_(std=0.2)


def images(height: int = 64, width: int = 96, batch: int = 1) -> Tensor:
    """Random normalised images [batch, 3, height, width]."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def make_published_depthers_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's depthers have small backbones, and narrow heads on other blocks."""
    both = {"LVD1689M": "a955f4ea", "SAT493M": "a6675841"}
    for name, ffn_layer, untied in (("dinov3_vit7b16", "swiglu64", both), ("dinov3_vitl16", "mlp", ["SAT493M"])):
        small = PublishedViT(16, 8, 1, 2, ffn_layer, both, untied=frozenset(untied))
        monkeypatch.setitem(PUBLISHED, name, small)
    for entry, kind in (("dinov3_vit7b16_dd", "dd"), ("dinov3_vitl16_chmv2", "chmv2")):
        config = depthers.CONFIGS[entry]
        for key in ("head_kwargs", "backbone_out_layers"):
            monkeypatch.setitem(config, key, CONFIGS[kind][key])
