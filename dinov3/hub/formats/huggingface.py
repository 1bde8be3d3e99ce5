"""DINOv3 in Hugging Face transformers: names, the parts of a ViT that are divided differently, configuration files.

There, queries, keys and values are three layers; joining them copies their weights, splitting them makes views. The
periods of positions are computed from the configuration, and there are no masks of biases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3.hub.architectures import build_from_shapes, count_blocks, has_gated_ffn
from dinov3.hub.formats.layouts import State, inverted, join_biases, rename, rope_base, split_biases
from dinov3.models.convnext import ConvNeXt

_VIT = {
    "cls_token": "embeddings.cls_token",
    "storage_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "blocks.{}.norm1": "layer.{}.norm1",
    "blocks.{}.norm2": "layer.{}.norm2",
    "blocks.{}.attn.proj": "layer.{}.attention.o_proj",
    "blocks.{}.ls1.gamma": "layer.{}.layer_scale1.lambda1",
    "blocks.{}.ls2.gamma": "layer.{}.layer_scale2.lambda1",
    "norm": "norm",
}
# `up_proj` means another layer in a gated FFN than in a plain one.
_FFN = {"blocks.{}.mlp.fc1": "layer.{}.mlp.up_proj", "blocks.{}.mlp.fc2": "layer.{}.mlp.down_proj"}
_GATED_FFN = {
    "blocks.{}.mlp.w1": "layer.{}.mlp.gate_proj",
    "blocks.{}.mlp.w2": "layer.{}.mlp.up_proj",
    "blocks.{}.mlp.w3": "layer.{}.mlp.down_proj",
}
CONVNEXT = {
    "downsample_layers.{}.{}": "stages.{}.downsample_layers.{}",
    "stages.{}.{}.dwconv": "stages.{}.layers.{}.depthwise_conv",
    "stages.{}.{}.norm": "stages.{}.layers.{}.layer_norm",
    "stages.{}.{}.pwconv1": "stages.{}.layers.{}.pointwise_conv1",
    "stages.{}.{}.pwconv2": "stages.{}.layers.{}.pointwise_conv2",
    "stages.{}.{}.gamma": "stages.{}.layers.{}.gamma",
    "norm": "layer_norm",
}


def vit_to_release(theirs: State) -> State:
    """Return the entries of a ViT by our names, all but the periods."""
    table = _VIT | (_GATED_FFN if "layer.0.mlp.gate_proj.weight" in theirs else _FFN)
    ours = _join_qkv(rename(theirs, inverted(table)))
    if ours.get("mask_token", torch.empty(0)).ndim == 3:
        ours["mask_token"] = ours["mask_token"].squeeze(1)
    if "storage_tokens" in ours and ours["storage_tokens"].numel() == 0:
        del ours["storage_tokens"]
    return ours


def vit_from_release(state: Mapping[str, Tensor]) -> State:
    """Return the entries of a ViT by their names, all but those for which there is no place."""
    has_no_place = re.compile(r"rope_embed\.|local_cls_norm\.|.*\.qkv\.")
    table = _VIT | (_GATED_FFN if has_gated_ffn(state) else _FFN)
    theirs = rename({name: tensor for name, tensor in state.items() if not has_no_place.match(name)}, table)
    theirs["embeddings.mask_token"] = state["mask_token"].unsqueeze(1)
    if "storage_tokens" not in state:
        theirs["embeddings.register_tokens"] = state["cls_token"][:, :0]
    for block in range(count_blocks(state)):
        for part, weight in zip("qkv", state[f"blocks.{block}.attn.qkv.weight"].chunk(3), strict=True):
            theirs[f"layer.{block}.attention.{part}_proj.weight"] = weight
    # The published models have the biases of queries and values even if they are zero.
    return theirs | split_biases(state, "layer.{}.attention.{}_proj.bias", keep_zeros=True)


def huggingface_config(
    state: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, layer_norm_eps: float
) -> dict[str, Any]:
    """Return the content of `config.json` for transformers.

    Args:
        state: a complete backbone in our names.
        theirs: the same in theirs.
        layer_norm_eps: what the layer norms add to the variance.
    """
    model = build_from_shapes(state)
    assert model is not None
    shared = {
        "image_size": 224,
        "num_channels": model.in_chans,
        "initializer_range": 0.02,
        "drop_path_rate": 0.0,
        "layer_norm_eps": layer_norm_eps,
        "dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
    }
    if isinstance(model, ConvNeXt):
        return {
            "architectures": ["DINOv3ConvNextModel"],
            "model_type": "dinov3_convnext",
            "depths": [len(stage) for stage in model.stages],  # type: ignore[arg-type]
            "hidden_sizes": model.embed_dims,
            "hidden_act": "gelu",
            "layer_scale_init_value": 1e-6,
            **shared,
        }
    is_gated = has_gated_ffn(state)
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": model.embed_dim,
        "intermediate_size": state["blocks.0.mlp.w1.weight" if is_gated else "blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": model.n_blocks,
        "num_attention_heads": model.num_heads,
        "num_register_tokens": model.n_storage_tokens,
        "patch_size": model.patch_size,
        "use_gated_mlp": is_gated,
        "hidden_act": "silu" if is_gated else "gelu",
        "rope_theta": rope_base(state["rope_embed.periods"]),
        "pos_embed_shift": None,
        "pos_embed_jitter": None,
        "pos_embed_rescale": 2.0,
        "query_bias": "layer.0.attention.q_proj.bias" in theirs,
        "key_bias": "layer.0.attention.k_proj.bias" in theirs,
        "value_bias": "layer.0.attention.v_proj.bias" in theirs,
        "proj_bias": "layer.0.attention.o_proj.bias" in theirs,
        "mlp_bias": "layer.0.mlp.up_proj.bias" in theirs,
        "layerscale_value": 1.0,
        "attention_dropout": 0.0,
        **shared,
    }


def preprocessor_config(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json` for transformers.

    Args:
        mean: of pixels in [0, 1], one number for each channel.
        std: the standard deviation of each channel.
    """
    return {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _join_qkv(ours: State) -> State:
    joined: State = {}
    for block in range(count_blocks(ours, r"layer\.(\d+)\.")):
        start = f"layer.{block}.attention."
        weights = [ours[name] for part in "qkv" if (name := f"{start}{part}_proj.weight") in ours]
        if len(weights) == 3 and len({weight.shape for weight in weights}) == 1:
            joined[f"blocks.{block}.attn.qkv.weight"] = torch.cat(weights)
        joined |= join_biases(f"blocks.{block}", *(ours.get(f"{start}{part}_proj.bias") for part in "qkv"))
    rest = {name: tensor for name, tensor in ours.items() if not re.fullmatch(r"layer\.\d+\..*\.[qkv]_proj\.\w+", name)}
    return rest | joined
