"""The backbones in the checkpoints of any trainer, below any keys and prefixes, without what else these hold.

Notable: a backbone is recognised by the entries that every one of its layout has. What is left out is either below
another prefix, or a head by its name; anything else stays, so that strict loading can refuse models that only look like
ours (a `pos_embed` is no detail).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3.utils.messages import list_names
from dinov3.utils.state_dicts import choose_prefix, find_prefixes, flatten
from dinov3.utils.weight_files import WeightsError

logger = logging.getLogger("dinov3")

#: An entry of each layout, and how another of the same backbone must begin.
_MARKS = (
    ("cls_token", ("blocks.0.",)),
    ("patch_embed.proj.weight", ("blocks.0.",)),
    ("embeddings.cls_token", ("layer.0.", "model.layer.0.")),
    ("downsample_layers.0.0.weight", ("stages.0.0.dwconv.",)),
    ("stages.0.downsample_layers.0.weight", ("stages.0.layers.0.depthwise_conv.",)),
    ("stem.0.weight", ("stages.0.blocks.0.conv_dw.",)),
)
#: The first part of the names of heads on top of a backbone.
_HEAD = re.compile(
    r"(?:\w+_)?(?:heads?|classifier|projector|projection|predictor|decoder|prototypes)(?:_\w+)?\d*|fc\d*"
)
_ADAPTER = re.compile(r"(?:^|\.)(?:lora_\w+|base_layer|modules_to_save)\.")


def find_backbones(content: Mapping[str, Any], *, source: str = "it") -> dict[str, dict[str, Any]]:
    """Return every backbone in what a file holds, by the keys and prefixes that lead to it, joined with dots.

    Args:
        content: nested mappings and tensors.
        source: where they come from, for error messages.

    Returns:
        The entries of each by their plain names, in the layout that they have, without heads.

    Raises:
        WeightsError: entries are of an adapter that has to be merged first, or only differ in wrappers.
    """
    return {prefix.removesuffix("."): found for prefix, found in _find(flatten(content, source=source), source).items()}


def select_backbone(
    content: Mapping[str, Any], *, source: str, fits: Callable[[dict[str, Any]], bool] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries of the backbone in what a file holds; what is left out is logged.

    Args:
        content: nested mappings and tensors.
        source: where they come from, for error messages.
        fits: says of the entries of one whether it is of the wanted size; asked if there are several.

    Returns:
        The entries by their plain names, and everything in `content` that is not a tensor.

    Raises:
        WeightsError: there is none, or there are several.
    """
    flat = flatten(content, source=source)
    found = _find(flat, source)
    if not found:
        return {}, flat
    if len(found) > 1:
        found = {prefix: entries for prefix, entries in found.items() if fits is None or fits(entries)} or found
    first, *others = found
    if all(_are_equal(found[first], found[other]) for other in others):
        found = {first: found[first]}
    shown = next(reversed(found)).removesuffix(".")
    advice = (
        "write the one that you mean into a file of its own, e.g. torch.save(dinov3.hub.weights.find_backbones("
        f"{source!r})[{shown!r}], 'backbone.pth'), and load that"
    )
    prefix = choose_prefix(found, source=source, what="backbones", advice=advice)
    entries = found[prefix]
    left_out = {_group(name, prefix): None for name in flat if not _is_under(name, prefix, entries)}
    if prefix or left_out:
        logger.info("%s: took %r, left out %s", source, prefix.removesuffix(".") or ".", list_names(left_out, most=20))
    return entries, {name: value for name, value in flat.items() if not isinstance(value, Tensor)}


def _find(flat: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    if adapter := next((name for name in flat if _ADAPTER.search(name)), None):
        raise WeightsError(
            f"{source} holds an adapter ({adapter}), which changes a backbone but is not one; merge it first, and load "
            "the new file: model = peft.PeftModel.from_pretrained(BACKBONE, ADAPTER_DIRECTORY).merge_and_unload(); "
            "torch.save(model.state_dict(), 'merged.pth')"
        )
    prefixes = set()
    for mark, others in _MARKS:
        for prefix in find_prefixes(flat, mark):
            if any(name.startswith(tuple(prefix + other for other in others)) for name in flat):
                prefixes.add(_above_model(prefix, flat))
    found: dict[str, dict[str, Any]] = {prefix: {} for prefix in sorted(prefixes)}
    for name, value in flat.items():
        if below := [prefix for prefix in found if name.startswith(prefix)]:
            prefix = max(below, key=len)
            if not _is_of_head(name.removeprefix(prefix)):
                found[prefix][name.removeprefix(prefix)] = value
    return found


def _above_model(prefix: str, names: Mapping[str, Any]) -> str:
    # In memory, a ConvNeXt of transformers has a level "model." which its final norm is not on.
    is_inner = f"{prefix}stages.0.downsample_layers.0.weight" in names and f"{prefix}layer_norm.weight" not in names
    return prefix.removesuffix("model.") if is_inner else prefix


def _is_of_head(name: str) -> bool:
    # The final norm of timm's ConvNeXt is a part of its head.
    return _HEAD.fullmatch(name.partition(".")[0]) is not None and not name.startswith("head.norm.")


def _is_under(name: str, prefix: str, entries: Mapping[str, Any]) -> bool:
    return name.startswith(prefix) and name.removeprefix(prefix) in entries


def _group(name: str, prefix: str) -> str:
    # Up to the first part that is not on the way to the backbone: "optimizer", "model.head".
    parts, way = name.split("."), prefix.split(".")
    shared = next((i for i, part in enumerate(parts) if i >= len(way) or part != way[i]), len(parts))
    return ".".join(parts[: shared + 1])


def _are_equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        return isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype and torch.equal(x, y)

    return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())
