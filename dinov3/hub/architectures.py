"""The structure of the published models, and which of them some weights would fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.models import vision_transformer
from dinov3.models.convnext import convnext_sizes, get_convnext_arch
from dinov3.models.vision_transformer import DinoVisionTransformer

#: What all published ViTs share.
SHARED_VIT_OPTIONS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "in_chans": 3,
    "pos_embed_rope_base": 100,
    "pos_embed_rope_normalize_coords": "separate",
    "pos_embed_rope_rescale_coords": 2,
    "pos_embed_rope_dtype": "fp32",
    "drop_path_rate": 0.0,
    "layerscale_init": 1e-5,
    "norm_layer": "layernormbf16",
    "ffn_bias": True,
    "proj_bias": True,
    "n_storage_tokens": 4,
    "mask_k_bias": True,
    "untie_cls_and_patch_norms": False,
}

UNTIED_CLS_NORM = "untie_global_and_local_cls_norm"


@dataclass(frozen=True)
class PublishedViT:
    """One entry of the hub.

    Attributes:
        embed_dim: D, channels of a token.
        depth: number of blocks.
        num_heads: attention heads.
        ffn_ratio: hidden channels of the FFN over D, before a SwiGLU keeps two thirds of them.
        ffn_layer: `mlp`, `swiglu` or `swiglu64`.
        hashes: first digits of the SHA-256 of each published file, by the data that it was trained on.
        qkv_bias: bias of queries, keys and values.
        untied: the data whose training had a norm of its own for the class tokens of local crops.
    """

    embed_dim: int
    depth: int
    num_heads: int
    ffn_ratio: float
    ffn_layer: str
    hashes: dict[str, str]
    qkv_bias: bool = True
    untied: frozenset[str] = field(default_factory=frozenset)

    def options(self) -> dict[str, Any]:
        """Arguments of `DinoVisionTransformer`, all but `untie_global_and_local_cls_norm`."""
        return SHARED_VIT_OPTIONS | {
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "ffn_ratio": self.ffn_ratio,
            "ffn_layer": self.ffn_layer,
            "qkv_bias": self.qkv_bias,
        }


PUBLISHED_VITS: dict[str, PublishedViT] = {
    "dinov3_vits16": PublishedViT(384, 12, 6, 4, "mlp", {"LVD1689M": "08c60483"}),
    "dinov3_vits16plus": PublishedViT(384, 12, 6, 6, "swiglu", {"LVD1689M": "4057cbaa"}),
    "dinov3_vitb16": PublishedViT(768, 12, 12, 4, "mlp", {"LVD1689M": "73cec8be"}),
    "dinov3_vitl16": PublishedViT(
        1024, 24, 16, 4, "mlp", {"LVD1689M": "8aa4cbdd", "SAT493M": "eadcf0ff"}, untied=frozenset({"SAT493M"})
    ),
    "dinov3_vitl16plus": PublishedViT(1024, 24, 16, 6, "swiglu", {"LVD1689M": "46503df0"}),
    "dinov3_vith16plus": PublishedViT(1280, 32, 20, 6, "swiglu", {"LVD1689M": "7c1da9a5"}),
    "dinov3_vit7b16": PublishedViT(
        4096,
        40,
        32,
        3,
        "swiglu64",
        {"LVD1689M": "a955f4ea", "SAT493M": "a6675841"},
        qkv_bias=False,
        untied=frozenset({"LVD1689M", "SAT493M"}),
    ),
}

FACTORIES = ("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_so400m", "vit_huge2", "vit_giant2", "vit_7b")


def has_untied_cls_norm(state: Mapping[str, Tensor]) -> bool:
    """Whether weights hold the extra norm for the class tokens of local crops."""
    return any(name.startswith("local_cls_norm.") for name in state)


def identify(state: Mapping[str, Tensor]) -> str | None:
    """Say, in a sentence for an error message, what model the entries of `state` belong to; None if unknown."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for layout, witness in _FOREIGN_LAYOUTS.items():
        if witness in shapes:
            return f"It has the layout of {layout}, which cannot be read here yet: convert it first."
    for name, model in _candidates(shapes):
        if shapes == {key: tuple(entry.shape) for key, entry in model.state_dict().items()}:
            return f"Its entries are those of {name}: use that instead."
    if "cls_token" not in shapes:
        return None
    dim, depth = shapes["cls_token"][-1], _n_blocks(shapes)
    names = [name for name, sizes in _factory_sizes().items() if sizes == (dim, depth)]
    same = f", as many as in a {names[0]}" if names else ""
    return f"It is a ViT of {dim} channels and {depth} blocks{same}."


#: An entry that only this layout has.
_FOREIGN_LAYOUTS = {
    "Hugging Face transformers": "embeddings.patch_embeddings.weight",
    "Hugging Face transformers (ConvNeXt)": "stages.0.downsample_layers.0.weight",
    "timm": "reg_token",
    "timm (ConvNeXt)": "stem.0.weight",
}


def _candidates(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, nn.Module]]:
    untied = "local_cls_norm.weight" in shapes
    with torch.device("meta"):
        for name, published in PUBLISHED_VITS.items():
            if shapes.get("cls_token") == (1, 1, published.embed_dim) and _n_blocks(shapes) == published.depth:
                yield name, DinoVisionTransformer(**published.options() | {UNTIED_CLS_NORM: untied})
        if "downsample_layers.0.0.weight" in shapes:
            for size in convnext_sizes:
                yield f"convnext_{size}", get_convnext_arch(f"convnext_{size}")()


def _n_blocks(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return len({match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))})


def _factory_sizes() -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        models = {name: getattr(vision_transformer, name)() for name in FACTORIES}
    return {name: (model.embed_dim, model.n_blocks) for name, model in models.items()}
