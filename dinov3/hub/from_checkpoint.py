"""Backbones of any size and any training, built from what a checkpoint holds.

Notable: shapes show all sizes. What they do not show comes from a configuration in or beside the checkpoint, otherwise
it is as in the published models, and a warning says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.hub.architectures import build_from_shapes, published_name
from dinov3.hub.formats.conversion import Converted
from dinov3.hub.formats.layouts import DEFAULT_ROPE_BASE, compute_periods, read_settings
from dinov3.hub.run_directory import find_checkpoint, find_run_config, read_run_config
from dinov3.hub.runs import load_from_config
from dinov3.hub.sources import Source, is_download, locate, read_weights
from dinov3.hub.weights import backbone_entries, check_complete, load_backbone_, read_state_dict, with_optional_entries
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger("dinov3")


def dinov3_from_checkpoint(
    weights: Source,
    *,
    device: torch.device | str | None = None,
    check_hash: bool = False,
    mmap: bool | None = None,
    progress: bool = True,
) -> nn.Module:
    """Load a backbone of the architecture of DINOv3, of any size and from any trainer, from its weights.

    Sizes, biases, norms, storage tokens and layer scales follow from the entries. A training run, or a file in one, is
    loaded with the run's configuration. Otherwise the heads, the positions and the epsilon of norms come from settings
    in the file or from a `config.json` beside it; those that are not there are as in the published models, and logged.

    Args:
        weights: a file or a directory as the other entries take it, a training run, an https:// URL or a state dict.
        device: where the model goes. Default: the CPU.
        check_hash: compare the file with the SHA-256 digits at the end of its name.
        mmap: True maps the file instead of reading it into memory: **then never write over it while the model lives.
            Write to another name and rename it.** Default: only if it has more than 4 GiB.
        progress: show a bar while downloading.

    Returns:
        A `DinoVisionTransformer` or a `ConvNeXt` in evaluation mode, its parameters trainable.

    Raises:
        FileNotFoundError: there is no such local file.
        ValueError: it does not hold a complete backbone of this architecture, or holds several.
        ConnectionError: the download failed.
    """
    if isinstance(weights, Mapping):
        state, source = backbone_entries(weights, source="the state dict"), "the state dict"
        for name, tensor in state.items():
            state[name] = tensor.clone()  # Because the model takes its tensors over.
    elif not is_download(weights) and (config_file := find_run_config(path := locate(weights))):
        model = load_from_config(read_run_config(config_file.parent), find_checkpoint(path), mmap=mmap)
        return model.to(device).eval()
    else:
        state, source = read_weights(
            weights, lambda path: read_state_dict(path, mmap=mmap), check_hash=check_hash, progress=progress
        )
    return build_backbone(state, source=source).to(device).eval()


def build_backbone(state: Mapping[str, Tensor], *, source: str) -> DinoVisionTransformer | ConvNeXt:
    """Build the backbone that some weights are of, and load them; for the arguments see `complete_backbone`."""
    model, complete = complete_backbone(state, source=source)
    return load_backbone_(model, complete, source=source)


def complete_backbone(
    state: Mapping[str, Tensor], *, source: str, config: Mapping[str, Any] | None = None
) -> tuple[DinoVisionTransformer | ConvNeXt, Mapping[str, Tensor]]:
    """Build the backbone that some weights are of, on the meta device; a warning names what was assumed.

    Args:
        state: as `read_state_dict` returns it.
        source: where it comes from, for messages.
        config: what entries do not show, see `read_settings`. Default: what came with the weights.

    Returns:
        The model, and all of its entries.

    Raises:
        WeightsError: it is not a complete backbone, or its configuration makes no sense.
    """
    settings = read_settings(config or (state.config if isinstance(state, Converted) else {}))
    # Both libraries compute positions in one way, and have one epsilon for each kind of model.
    is_foreign = isinstance(state, Converted) and state.layout is not None
    needed = [] if is_foreign else ["layer_norm_eps"]
    options, complete = {}, state
    if "cls_token" in state:
        needed += [] if is_foreign else ["pos_embed_rope_normalize_coords"]
        if "rope_embed.periods" not in state and (periods := compute_periods(state, settings)) is not None:
            complete = {**state, "rope_embed.periods": periods}
            needed += ["num_heads", "pos_embed_rope_base"]
        names = ("pos_embed_rope_normalize_coords", "pos_embed_rope_dtype", "norm_layer")
        options = {name: settings[name] for name in names if name in settings}
    model = build_from_shapes(complete, options)
    if model is not None:
        _set_epsilon(model, settings)
        complete = with_optional_entries(complete, model, source=source)
    check_complete(complete, model, source=source)
    assert model is not None
    _log(model, complete, settings, needed, source)
    return model, complete


def _set_epsilon(model: nn.Module, settings: Mapping[str, Any]) -> None:
    if (eps := settings.get("layer_norm_eps")) is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps


def _log(
    model: nn.Module, state: Mapping[str, Tensor], settings: Mapping[str, Any], needed: Sequence[str], source: str
) -> None:
    name, kind = published_name(state), type(model).__name__
    logger.info("%s has the structure of %s", source, name or f"a {kind}")
    values = {"layer_norm_eps": getattr(model.norm, "eps", None)}
    if isinstance(model, DinoVisionTransformer):
        values |= {"num_heads": model.num_heads, "pos_embed_rope_base": DEFAULT_ROPE_BASE}
        values |= {"pos_embed_rope_normalize_coords": model.rope_embed.normalize_coords}
    given = {**settings, **({"layer_norm_eps": None} if "norm_layer" in settings else {})}
    given |= {"pos_embed_rope_base": None} if "pos_embed_rope_max_period" in settings else {}
    assumed = {name: values[name] for name in needed if name not in given and values[name] is not None}
    if assumed and name is None:
        logger.warning(
            "%s: assumed %s as in the published models, because neither the weights nor a configuration in or beside "
            "them say so; the configuration of the training, if you have it, decides (dinov3_from_run, or in "
            "evaluations model.config_file)",
            source,
            ", ".join(f"{name}={value}" for name, value in assumed.items()),
        )
