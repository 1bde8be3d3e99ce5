"""The structure of the published models, and which of them some weights would fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.models import vision_transformer
from dinov3.models.convnext import ConvNeXt, convnext_sizes
from dinov3.models.vision_transformer import DinoVisionTransformer

#: Arguments that all published ViTs share.
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

_IN_BLOCKS = ("blocks.", "stages.")
#: The argument that only the weights decide.
UNTIED_CLS_NORM = "untie_global_and_local_cls_norm"


@dataclass(frozen=True)
class PublishedViT:
    """A ViT of the hub.

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
        """Return the arguments of `DinoVisionTransformer`, all but `untie_global_and_local_cls_norm`."""
        own = ("embed_dim", "depth", "num_heads", "ffn_ratio", "ffn_layer", "qkv_bias")
        return SHARED_VIT_OPTIONS | {name: getattr(self, name) for name in own}


@dataclass(frozen=True)
class PublishedConvNeXt:
    """A ConvNeXt of the hub.

    Attributes:
        depths: blocks of each of the four stages.
        dims: channels of each of the four stages.
        hashes: first digits of the SHA-256 of each published file, by the data that it was trained on.
    """

    depths: Sequence[int]
    dims: Sequence[int]
    hashes: dict[str, str]

    def options(self) -> dict[str, Any]:
        """Return the arguments of `ConvNeXt`; all others keep their defaults."""
        return {"depths": self.depths, "dims": self.dims}


_CONVNEXT_HASHES = {"tiny": "21b726bb", "small": "296db49d", "base": "801f2ba9", "large": "61fa432d"}
_BOTH = frozenset({"LVD1689M", "SAT493M"})
#: The structure of each published backbone, by its hub entry.
PUBLISHED: dict[str, PublishedViT | PublishedConvNeXt] = {
    "dinov3_vits16": PublishedViT(384, 12, 6, 4, "mlp", {"LVD1689M": "08c60483"}),
    "dinov3_vits16plus": PublishedViT(384, 12, 6, 6, "swiglu", {"LVD1689M": "4057cbaa"}),
    "dinov3_vitb16": PublishedViT(768, 12, 12, 4, "mlp", {"LVD1689M": "73cec8be"}),
    "dinov3_vitl16": PublishedViT(
        1024, 24, 16, 4, "mlp", {"LVD1689M": "8aa4cbdd", "SAT493M": "eadcf0ff"}, untied=frozenset({"SAT493M"})
    ),
    "dinov3_vitl16plus": PublishedViT(1024, 24, 16, 6, "swiglu", {"LVD1689M": "46503df0"}),
    "dinov3_vith16plus": PublishedViT(1280, 32, 20, 6, "swiglu", {"LVD1689M": "7c1da9a5"}),
    "dinov3_vit7b16": PublishedViT(
        4096, 40, 32, 3, "swiglu64", {"LVD1689M": "a955f4ea", "SAT493M": "a6675841"}, qkv_bias=False, untied=_BOTH
    ),
} | {
    f"dinov3_convnext_{size}": PublishedConvNeXt(**convnext_sizes[size], hashes={"LVD1689M": file_hash})
    for size, file_hash in _CONVNEXT_HASHES.items()
}


def has_untied_cls_norm(state: Mapping[str, Tensor]) -> bool:
    """Return whether weights hold the extra norm for the class tokens of local crops."""
    return any(name.startswith("local_cls_norm.") for name in state)


def has_gated_ffn(state: Mapping[str, Tensor]) -> bool:
    """Return whether the FFNs of a ViT are SwiGLUs."""
    return "blocks.0.mlp.w1.weight" in state


def identify(state: Mapping[str, Tensor]) -> str | None:
    """Say in a phrase, for an error message, what model the entries of `state` belong to; None if unknown."""
    if other := identify_other_model(state):
        return other
    if name := published_name(state):
        return f"its entries are those of {name}, use that instead"
    if "cls_token" not in state:
        return None
    dim, depth = state["cls_token"].shape[-1], count_blocks(state)
    with torch.device("meta"):
        models = {name: make() for name, make in vars(vision_transformer).items() if name.startswith("vit_")}
    names = [name for name, model in models.items() if (model.embed_dim, model.n_blocks) == (dim, depth)]
    same = f", like a {names[0]}" if names else ""
    return f"it is a ViT with {dim} channels and {depth} blocks{same}"


def identify_other_model(names: Collection[str]) -> str | None:
    """Say in a phrase what these entries are of, if it is something that people take for a backbone; otherwise None."""
    return next((description for description, is_that in _OTHER_MODELS.items() if is_that(names)), None)


def published_name(state: Mapping[str, Tensor]) -> str | None:
    """Return the hub entry that has exactly the entries of `state`, by their names and shapes; None if none has."""
    is_convnext, is_vit = "downsample_layers.0.0.weight" in state, "cls_token" in state
    sizes = (state["cls_token"].shape[-1], count_blocks(state)) if is_vit else None
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for name, published in PUBLISHED.items():
        options = published.options()
        with torch.device("meta"):
            if isinstance(published, PublishedConvNeXt) and is_convnext:
                model: nn.Module = ConvNeXt(**options)
            elif isinstance(published, PublishedViT) and sizes == (published.embed_dim, published.depth):
                model = DinoVisionTransformer(**options | {UNTIED_CLS_NORM: has_untied_cls_norm(state)})
            else:
                continue
        if shapes == {key: entry.shape for key, entry in model.state_dict().items()}:
            return name
    return None


def published_vit_of_size(state: Mapping[str, Tensor]) -> PublishedViT | None:
    """Return the first published ViT with the channels and blocks of `state`, a ViT in our names; None if none has."""
    sizes = state["cls_token"].shape[-1], count_blocks(state)
    vits = [published for published in PUBLISHED.values() if isinstance(published, PublishedViT)]
    return next((vit for vit in vits if (vit.embed_dim, vit.depth) == sizes), None)


def build_from_shapes(
    state: Mapping[str, Tensor], settings: dict[str, Any] | None = None
) -> DinoVisionTransformer | ConvNeXt | None:
    """Build on the meta device the backbone whose sizes the entries of `state` show.

    To find out whether `state` is complete, compare it with the state dict of the result.

    Args:
        state: in our names.
        settings: arguments of `DinoVisionTransformer` that entries do not show. Default: as in the published models.

    Returns:
        The model; None if the entries do not suffice to tell.
    """
    try:
        with torch.device("meta"):
            if "downsample_layers.0.0.weight" in state:
                return ConvNeXt(
                    in_chans=state["downsample_layers.0.0.weight"].shape[1],
                    depths=[count_blocks(state, rf"stages\.{stage}\.(\d+)\.") for stage in range(4)],
                    dims=[state[f"stages.{stage}.0.dwconv.weight"].shape[0] for stage in range(4)],
                    layer_scale_init_value=1e-6 if "stages.0.0.gamma" in state else 0.0,
                )
            return DinoVisionTransformer(**_vit_options(state) | (settings or {}))
    except (KeyError, ValueError, IndexError, ZeroDivisionError, AssertionError):
        return None


def _vit_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    dim, is_gated = state["cls_token"].shape[-1], has_gated_ffn(state)
    first_linear = "blocks.0.mlp.w1" if is_gated else "blocks.0.mlp.fc1"
    hidden = state[f"{first_linear}.weight"].shape[0]
    return SHARED_VIT_OPTIONS | {
        "embed_dim": dim,
        "depth": count_blocks(state),
        # The rotation has one period for every four channels of a head.
        "num_heads": dim // (4 * len(state["rope_embed.periods"])),
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "in_chans": state["patch_embed.proj.weight"].shape[1],
        # A gated FFN keeps two thirds of its hidden channels, and rounds them down first.
        "ffn_ratio": (1.5 * hidden + 0.5) / dim if is_gated else (hidden + 0.5) / dim,
        "ffn_layer": "swiglu" if is_gated else "mlp",
        "ffn_bias": f"{first_linear}.bias" in state,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "mask_k_bias": "blocks.0.attn.qkv.bias_mask" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "layerscale_init": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "norm_layer": "layernormbf16" if "norm.bias" in state else "rmsnorm",
        "n_storage_tokens": state["storage_tokens"].shape[1] if "storage_tokens" in state else 0,
        "untie_cls_and_patch_norms": "cls_norm.weight" in state,
        UNTIED_CLS_NORM: has_untied_cls_norm(state),
    }


def has_sizes_of(state: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Return whether the entries that `state` shares with a backbone have its shapes, and all blocks are the same."""
    own = model.state_dict()
    blocks = [{name.rpartition(".")[0] for name in names if name.startswith(_IN_BLOCKS)} for names in (own, state)]
    return blocks[0] == blocks[1] and all(state[name].shape == own[name].shape for name in own if name in state)


def count_blocks(names: Iterable[str], pattern: str = r"blocks\.(\d+)\.") -> int:
    """Count the blocks that the entries of a ViT belong to.

    Args:
        names: of the entries.
        pattern: matches the beginning of those of a block, with its index as a group.
    """
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _some_name_has(*parts: str) -> Callable[[Collection[str]], bool]:
    return lambda names: all(any(part in name for name in names) for part in parts)


#: Other weights that people have on their disks, and the names by which they are recognised.
_OTHER_MODELS: dict[str, Callable[[Collection[str]], bool]] = {
    "it is a single linear layer, such as the head of a classifier (load it with the entry of that head, e.g. "
    "dinov3_vit7b16_lc(weights=...), and the backbone with backbone_weights=...)": lambda names: (
        set(names) <= {"weight", "bias"}
    ),
    "it is the head of a depth estimator (DPT), not a backbone": _some_name_has("reassemble_blocks."),
    "these are the weights of a detector, not of a backbone": _some_name_has("transformer.decoder."),
    "these are the weights of a segmentation model, not of a backbone": _some_name_has("segmentation_model."),
    "it is a text encoder with the vision head that belongs to it (dino.txt), not a backbone": _some_name_has(
        "text_model."
    ),
    "it is the DINO head of a training, not a backbone": lambda names: (
        "last_layer.weight" in names and "cls_token" not in names
    ),
    "it is a DINOv2 model of Hugging Face transformers, or another ViT with learned positions": _some_name_has(
        "embeddings.position_embeddings"
    ),
    "it is a DINOv2 model, or another ViT with learned positions (pos_embed)": lambda names: "pos_embed" in names,
    "it is a CLIP model": _some_name_has("visual.", "logit_scale"),
    "it is a ResNet": _some_name_has("layer1.0.conv1.weight"),
}
