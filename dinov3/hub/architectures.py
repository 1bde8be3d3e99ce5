"""The structure of the published models, and which of them some weights would fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.models import vision_transformer
from dinov3.models.convnext import ConvNeXt, convnext_sizes
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


@dataclass(frozen=True)
class PublishedConvNeXt:
    """One entry of the hub.

    Attributes:
        depths: blocks of each of the four stages.
        dims: channels of each of the four stages.
        hashes: first digits of the SHA-256 of each published file, by the data that it was trained on.
    """

    depths: Sequence[int]
    dims: Sequence[int]
    hashes: dict[str, str]

    def options(self) -> dict[str, Any]:
        """Arguments of `ConvNeXt`."""
        return {
            "in_chans": 3,
            "depths": self.depths,
            "dims": self.dims,
            "drop_path_rate": 0.0,
            "layer_scale_init_value": 1e-6,
            "patch_size": None,
        }


PUBLISHED_CONVNEXTS: dict[str, PublishedConvNeXt] = {
    f"dinov3_convnext_{size}": PublishedConvNeXt(**convnext_sizes[size], hashes={"LVD1689M": file_hash})
    for size, file_hash in {"tiny": "21b726bb", "small": "296db49d", "base": "801f2ba9", "large": "61fa432d"}.items()
}

FACTORIES = ("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_so400m", "vit_huge2", "vit_giant2", "vit_7b")


def has_untied_cls_norm(state: Mapping[str, Tensor]) -> bool:
    """Whether weights hold the extra norm for the class tokens of local crops."""
    return any(name.startswith("local_cls_norm.") for name in state)


def has_gated_ffn(state: Mapping[str, Tensor]) -> bool:
    """Whether the FFNs of a ViT are SwiGLUs."""
    return "blocks.0.mlp.w1.weight" in state


def identify(state: Mapping[str, Tensor]) -> str | None:
    """Say, in a sentence for an error message, what model the entries of `state` belong to; None if unknown."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for description, is_that in _OTHER_MODELS.items():
        if is_that(shapes):
            return f"It is {description}."
    if name := published_name(state):
        return f"Its entries are those of {name}: use that instead."
    if "cls_token" not in shapes:
        return None
    dim, depth = shapes["cls_token"][-1], count_blocks(shapes)
    names = [name for name, sizes in _factory_sizes().items() if sizes == (dim, depth)]
    same = f", as many as in a {names[0]}" if names else ""
    return f"It is a ViT of {dim} channels and {depth} blocks{same}."


def published_name(state: Mapping[str, Tensor]) -> str | None:
    """The hub entry that has exactly the entries of `state`, by their names and shapes; None if none has."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, model in _candidates(shapes):
        if shapes == {key: tuple(entry.shape) for key, entry in model.state_dict().items()}:
            return name
    return None


def published_vit_like(state: Mapping[str, Tensor]) -> PublishedViT | None:
    """The published ViT of as many channels and blocks; None if there is none."""
    sizes = state["cls_token"].shape[-1], count_blocks(state)
    return next((vit for vit in PUBLISHED_VITS.values() if (vit.embed_dim, vit.depth) == sizes), None)


def build_like(state: Mapping[str, Tensor]) -> DinoVisionTransformer | ConvNeXt | None:
    """The backbone that `state` looks like, on the meta device, with the sizes that its entries tell.

    Whether it is complete, a comparison with the state dict of the result tells. What entries do not tell is as in the
    published models.

    Args:
        state: in our names.

    Returns:
        The model; None if there is too little to go by.
    """
    try:
        is_convnext = "downsample_layers.0.0.weight" in state
        with torch.device("meta"):
            return ConvNeXt(**_convnext_options(state)) if is_convnext else DinoVisionTransformer(**_vit_options(state))
    except (KeyError, ValueError, IndexError, ZeroDivisionError, AssertionError):
        return None


def _convnext_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "in_chans": state["downsample_layers.0.0.weight"].shape[1],
        "depths": [count_blocks(state, rf"stages\.{stage}\.(\d+)\.") for stage in range(4)],
        "dims": [state[f"stages.{stage}.0.dwconv.weight"].shape[0] for stage in range(4)],
        "layer_scale_init_value": 1e-6 if "stages.0.0.gamma" in state else 0.0,
    }


def _vit_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    dim, depth = state["cls_token"].shape[-1], count_blocks(state)
    is_gated = has_gated_ffn(state)
    hidden = state["blocks.0.mlp.w1.weight" if is_gated else "blocks.0.mlp.fc1.weight"].shape[0]
    return SHARED_VIT_OPTIONS | {
        "embed_dim": dim,
        "depth": depth,
        "num_heads": dim // (4 * len(state["rope_embed.periods"])),
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "in_chans": state["patch_embed.proj.weight"].shape[1],
        # A gated FFN keeps two thirds of its hidden channels, and rounds them down first.
        "ffn_ratio": (1.5 * hidden + 0.5) / dim if is_gated else (hidden + 0.5) / dim,
        "ffn_layer": "swiglu" if is_gated else "mlp",
        "ffn_bias": f"blocks.0.mlp.{'w1' if is_gated else 'fc1'}.bias" in state,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "mask_k_bias": "blocks.0.attn.qkv.bias_mask" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "layerscale_init": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "norm_layer": "layernormbf16" if "norm.bias" in state else "rmsnorm",
        "n_storage_tokens": state["storage_tokens"].shape[1] if "storage_tokens" in state else 0,
        "untie_cls_and_patch_norms": "cls_norm.weight" in state,
        UNTIED_CLS_NORM: has_untied_cls_norm(state),
    }


def count_blocks(names: Iterable[str], pattern: str = r"blocks\.(\d+)\.") -> int:
    """How many blocks the entries of a ViT belong to.

    Args:
        names: of the entries.
        pattern: matches the beginning of those of a block, with its index as a group.
    """
    matches = (re.match(pattern, name) for name in names)
    return len({match[1] for match in matches if match})


Shapes = Mapping[str, tuple[int, ...]]


def _has(*witnesses: str) -> Callable[[Shapes], bool]:
    return lambda shapes: all(any(witness in name for name in shapes) for witness in witnesses)


#: What people also have on their disks, and what tells it.
_OTHER_MODELS: dict[str, Callable[[Shapes], bool]] = {
    "a single linear layer, such as the head of a classifier (load it with the entry of that head, e.g. "
    "dinov3_vit7b16_lc(weights=...), and the backbone with backbone_weights=...)": lambda shapes: (
        shapes.keys() <= {"weight", "bias"}
    ),
    "the head of a depth estimator (DPT), not a backbone": _has("reassemble_blocks."),
    "the weights of a detector, not a backbone": _has("transformer.decoder."),
    "the weights of a segmentation model, not a backbone": _has("segmentation_model."),
    "a text encoder and the vision head that belongs to it (dino.txt), not a backbone": _has("text_model."),
    "the DINOHead of a training, not a backbone": lambda shapes: (
        "last_layer.weight" in shapes and "cls_token" not in shapes
    ),
    "a DINOv2 model of Hugging Face transformers, or another ViT with learned positions": _has(
        "embeddings.position_embeddings"
    ),
    "a DINOv2 model, or another ViT with learned positions (pos_embed)": lambda shapes: "pos_embed" in shapes,
    "a CLIP model": _has("visual.", "logit_scale"),
    "a ResNet": _has("layer1.0.conv1.weight"),
}


def _candidates(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, nn.Module]]:
    untied = "local_cls_norm.weight" in shapes
    with torch.device("meta"):
        for name, published in PUBLISHED_VITS.items():
            if shapes.get("cls_token") == (1, 1, published.embed_dim) and count_blocks(shapes) == published.depth:
                yield name, DinoVisionTransformer(**published.options() | {UNTIED_CLS_NORM: untied})
        if "downsample_layers.0.0.weight" in shapes:
            for name, sizes in PUBLISHED_CONVNEXTS.items():
                yield name, ConvNeXt(**sizes.options())


def _factory_sizes() -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        models = {name: getattr(vision_transformer, name)() for name in FACTORIES}
    return {name: (model.embed_dim, model.n_blocks) for name, model in models.items()}
