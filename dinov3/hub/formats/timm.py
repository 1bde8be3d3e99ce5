"""DINOv3 in timm: names, the biases of a ViT, and its configuration file.

There, models have no mask token, the periods of positions are computed, keys have no bias, and the biases of queries
and values are left out if they are all zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3.hub.architectures import build_from_shapes, count_blocks, has_gated_ffn, published_vit_of_size
from dinov3.hub.formats.layouts import State, inverted, join_biases, rename, rope_base, split_biases
from dinov3.models.convnext import ConvNeXt

#: Names of the published ViTs; timm has no ViT-L+.
VITS = {
    "dinov3_vits16": "vit_small_patch16_dinov3",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3",
    "dinov3_vitb16": "vit_base_patch16_dinov3",
    "dinov3_vitl16": "vit_large_patch16_dinov3",
    "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3",
    "dinov3_vit7b16": "vit_7b_patch16_dinov3",
}

# All other entries of a ViT have the same name as ours.
_VIT = {
    "storage_tokens": "reg_token",
    "blocks.{}.ls1.gamma": "blocks.{}.gamma_1",
    "blocks.{}.ls2.gamma": "blocks.{}.gamma_2",
}
# Only for these: a plain FFN also has an `fc2`, with the same name as ours.
_GATED_FFN = {
    "blocks.{}.mlp.w1": "blocks.{}.mlp.fc1_g",
    "blocks.{}.mlp.w2": "blocks.{}.mlp.fc1_x",
    "blocks.{}.mlp.w3": "blocks.{}.mlp.fc2",
}
CONVNEXT = {
    "downsample_layers.0.0": "stem.0",
    "downsample_layers.0.1": "stem.1",
    "downsample_layers.{}.{}": "stages.{}.downsample.{}",
    "stages.{}.{}.dwconv": "stages.{}.blocks.{}.conv_dw",
    "stages.{}.{}.norm": "stages.{}.blocks.{}.norm",
    "stages.{}.{}.pwconv1": "stages.{}.blocks.{}.mlp.fc1",
    "stages.{}.{}.pwconv2": "stages.{}.blocks.{}.mlp.fc2",
    "stages.{}.{}.gamma": "stages.{}.blocks.{}.gamma",
    "norm": "head.norm",
}


def vit_to_release(theirs: State) -> State:
    """Return the entries of a ViT by our names, all but the periods, with a mask token of zeros."""
    table = _VIT | _GATED_FFN if "blocks.0.mlp.fc1_g.weight" in theirs else _VIT
    ours = rename(theirs, inverted(table))
    if "cls_token" in ours:
        ours["mask_token"] = torch.zeros_like(ours["cls_token"][0])
    return _join_all_biases(ours)


def vit_from_release(state: Mapping[str, Tensor]) -> State:
    """Return the entries of a ViT by their names, all but those for which there is no place."""
    has_no_place = re.compile(r"rope_embed\.|local_cls_norm\.|mask_token|.*\.qkv\.bias")
    table = _VIT | _GATED_FFN if has_gated_ffn(state) else _VIT
    theirs = rename({name: tensor for name, tensor in state.items() if not has_no_place.match(name)}, table)
    return theirs | split_biases(state, "blocks.{}.attn.{}_bias")


def timm_config(
    state: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    name: str | None,
    normalization: tuple[tuple[float, ...], tuple[float, ...]],
) -> dict[str, Any]:
    """Return the content of `config.json` for timm.

    Args:
        state: a complete backbone in our names.
        theirs: the same in theirs.
        name: its hub entry; None for another size, which timm builds from a published architecture with arguments.
        normalization: mean and standard deviation of pixels in [0, 1].
    """
    model = build_from_shapes(state)
    assert model is not None
    arguments: dict[str, Any] = {}
    if isinstance(model, ConvNeXt):
        architecture, first, side, head = (name or "convnext_tiny").removeprefix("dinov3_"), "stem.0", 224, "head.fc"
        if name is None:
            depths = [len(stage) for stage in model.stages]  # type: ignore[arg-type]
            arguments = {"depths": depths, "dims": model.embed_dims}
    else:
        nearest = "dinov3_vits16plus" if has_gated_ffn(state) else "dinov3_vits16"
        architecture = VITS.get(name or "", VITS[nearest]) + ("_qkvb" if "blocks.0.attn.q_bias" in theirs else "")
        first, side, head = "patch_embed.proj", 16 * model.patch_size, "head"
        arguments = {"global_pool": "token"}
        if name not in VITS:
            hidden = theirs["blocks.0.mlp.fc2.weight"].shape[1]
            arguments |= {
                "embed_dim": model.embed_dim,
                "depth": model.n_blocks,
                "num_heads": model.num_heads,
                "mlp_ratio": (hidden + 0.5) / model.embed_dim,
                "num_reg_tokens": model.n_storage_tokens,
                "patch_size": model.patch_size,
                "rope_temperature": rope_base(state["rope_embed.periods"]),
            }
    if model.in_chans != 3:
        arguments["in_chans"] = model.in_chans
    mean, std = normalization
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": model.embed_dim,
        "pretrained_cfg": {
            "tag": "dinov3",
            "num_classes": 0,
            "input_size": [model.in_chans, side, side],
            "fixed_input_size": False,
            "pool_size": None,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": list(mean),
            "std": list(std),
            "first_conv": first,
            "classifier": head,
        },
        "model_args": arguments,
    }


def _join_all_biases(ours: State) -> State:
    # A file without biases may be of a model that has none or whose biases are zero: the published model decides.
    published = published_vit_of_size(ours) if "cls_token" in ours else None
    joined: State = {}
    for block in range(count_blocks(ours)):
        q, k, v = (ours.get(f"blocks.{block}.attn.{part}_bias") for part in "qkv")
        if q is None and v is None and "cls_token" in ours and (published is None or published.qkv_bias):
            q = torch.zeros_like(ours["cls_token"][0, 0])
        joined |= join_biases(f"blocks.{block}", q, k, v)
    rest = {name: tensor for name, tensor in ours.items() if not re.fullmatch(r"blocks\.\d+\.attn\.[qkv]_bias", name)}
    return rest | joined
