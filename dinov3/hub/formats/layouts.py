"""How other libraries lay out the entries of a backbone: names, the parts of a ViT's biases, periods of positions.

A table goes from our names to another library's. It holds the name of an entry, with {} for each index, or the name of
a module, which then also stands for its weight and bias.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dinov3.hub.architectures import count_blocks, published_vit_of_size
from dinov3.layers.rope_position_encoding import NORMALIZATIONS, RopePositionEmbedding
from dinov3.models.vision_transformer import dtype_dict, norm_layer_dict
from dinov3.utils.state_dicts import flatten
from dinov3.utils.weight_files import WeightsError

Library = Literal["huggingface", "timm"]
Family = Literal["vit", "convnext"]
State = dict[str, Tensor]
Table = Mapping[str, str]

#: Of the published models; both libraries use the same, and it is not written in the weights.
LAYER_NORM_EPS: dict[Family, float] = {"vit": 1e-5, "convnext": 1e-6}
#: Classifiers that a fine-tuned model may have on top.
_CLASSIFIERS = ("head.weight", "head.bias", "head.fc.", "classifier.")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")

DEFAULT_ROPE_BASE = 100.0
USUAL_HEAD_DIM = 64

#: What weights do not show, by our arguments, and what it is called in configurations: ours, transformers' and timm's.
SETTINGS = {
    "num_heads": ("num_heads", "num_attention_heads"),
    "pos_embed_rope_base": ("pos_embed_rope_base", "rope_theta", "rope_temperature"),
    "pos_embed_rope_min_period": ("pos_embed_rope_min_period",),
    "pos_embed_rope_max_period": ("pos_embed_rope_max_period",),
    "pos_embed_rope_normalize_coords": ("pos_embed_rope_normalize_coords",),
    "pos_embed_rope_dtype": ("pos_embed_rope_dtype",),
    "norm_layer": ("norm_layer",),
    "layer_norm_eps": ("layer_norm_eps",),
}
#: Of the settings that are words.
_CHOICES: dict[str, Collection[str]] = {
    "pos_embed_rope_normalize_coords": NORMALIZATIONS,
    "pos_embed_rope_dtype": dtype_dict,
    "norm_layer": norm_layer_dict,
}


@dataclass(frozen=True)
class Layout:
    """How weights are named.

    Attributes:
        library: whose names.
        family: which kind of model.
        prefix: before all names of the backbone, where it is a part of a larger model.
    """

    library: Library
    family: Family
    prefix: str = ""

    def __str__(self) -> str:
        return {"huggingface": "Hugging Face transformers", "timm": "timm"}[self.library]


def detect(names: Iterable[str]) -> Layout | None:
    """Return the layout of another library that the names of a state dict belong to; None if they belong to none."""
    names = set(names)
    for name in names:
        if name.endswith("embeddings.patch_embeddings.weight"):
            return Layout("huggingface", "vit", name.removesuffix("embeddings.patch_embeddings.weight"))
        if name.endswith("stages.0.downsample_layers.0.weight"):
            prefix = name.removesuffix("stages.0.downsample_layers.0.weight")
            # In memory, "model." is a level of the backbone that its final norm is not on.
            return Layout("huggingface", "convnext", prefix.removesuffix("model."))
    if not names.isdisjoint({"reg_token", "blocks.0.gamma_1", "blocks.0.attn.q_bias", "blocks.0.mlp.fc1_g.weight"}):
        return Layout("timm", "vit")
    if {"stem.0.weight", "stages.0.blocks.0.conv_dw.weight"} <= names:
        return Layout("timm", "convnext")
    return None


def select_backbone(state: Mapping[str, Tensor], layout: Layout) -> State:
    """Return the backbone's entries without the prefix, and nothing else of a larger model, such as a classifier."""
    theirs: State = {}
    for name, tensor in state.items():
        if name.startswith(layout.prefix):
            name = name.removeprefix(layout.prefix)
        elif not name.startswith(("layer.", "stages.", "model.layer.", "model.stages.")):
            continue
        if layout.library == "huggingface":
            name = re.sub(r"^model\.(?=layer\.|stages\.)", "", name)
        if not name.startswith(_CLASSIFIERS):
            theirs[name] = tensor
    return theirs


def rename(state: Mapping[str, Tensor], table: Table) -> State:
    """Return the entries by the names of a table; those that it does not know keep theirs."""
    return {_look_up(name, table): tensor for name, tensor in state.items()}


def inverted(table: Table) -> Table:
    """Return the table back to our names."""
    return {theirs: ours for ours, theirs in table.items()}


def _look_up(name: str, table: Table) -> str:
    indices = _INDEX.findall(name)
    for pattern in (name, _INDEX.sub("{}", name)):
        module, _, leaf = pattern.rpartition(".")
        if pattern in table:
            return table[pattern].format(*indices)
        if module in table and leaf in ("weight", "bias"):
            return f"{table[module].format(*indices)}.{leaf}"
    return name


def masked_bias(state: Mapping[str, Tensor], block: str) -> Tensor | None:
    """Return the bias [3 D] of queries, keys and values after its mask; None if there is none.

    Args:
        state: a ViT in our names.
        block: the block's name, e.g. `blocks.0`.
    """
    bias, mask = state.get(f"{block}.attn.qkv.bias"), state.get(f"{block}.attn.qkv.bias_mask")
    return bias if bias is None or mask is None else bias * mask.to(bias.dtype)


def split_biases(state: Mapping[str, Tensor], name: str, *, keep_zeros: bool = False) -> State:
    """Return the masked biases of queries, keys and values of all blocks, each as an entry of its own.

    Args:
        state: a ViT in our names.
        name: of the entries, with {} for the block and for the letter.
        keep_zeros: also return the biases of queries and values if all are zero.
    """
    biases = {block: masked_bias(state, f"blocks.{block}") for block in range(count_blocks(state))}
    parts = {block: bias.chunk(3) for block, bias in biases.items() if bias is not None}
    # A model has biases of queries and values in all of its blocks or in none.
    has_q, has_k, has_v = (any(bool(part[i].any()) for part in parts.values()) for i in range(3))
    is_wanted = {"q": keep_zeros or has_q or has_v, "k": has_k, "v": keep_zeros or has_q or has_v}
    return {
        name.format(block, letter): bias
        for block, three in parts.items()
        for letter, bias in zip("qkv", three, strict=True)
        if is_wanted[letter]
    }


def join_biases(block: str, q: Tensor | None, k: Tensor | None, v: Tensor | None) -> State:
    """Return our two entries of a block, from its biases; nothing if it has no bias at all."""
    given = [bias for bias in (q, k, v) if bias is not None]
    if not given:
        return {}
    zero, one = torch.zeros_like(given[0]), torch.ones_like(given[0])
    q, k, v = (zero if bias is None else bias for bias in (q, k, v))
    return {
        f"{block}.attn.qkv.bias": torch.cat([q, k, v]),
        f"{block}.attn.qkv.bias_mask": torch.cat([one, one if bool(k.any()) else zero, one]),
    }


def rope_base(periods: Tensor) -> float | None:
    """Return the base of which `periods` [d / 4] are the powers, up to their rounding; None if they are not powers."""
    exact, n = periods.detach().double().cpu(), len(periods)
    # Published files hold periods that were rounded to bfloat16, whatever their dtype is now.
    roundings = ((torch.bfloat16, 2**-8), (torch.float16, 2**-10), (torch.float64, 1e-5))
    tolerance = next(tolerance for dtype, tolerance in roundings if torch.equal(exact.to(dtype).double(), exact))
    exponents = torch.arange(n, dtype=torch.float64) / n
    fitted = float((exponents @ exact.log() / (exponents @ exponents).clamp_min(1e-9)).exp())
    # A round base is likelier than the fitted one, which carries the rounding of the periods.
    for base in (DEFAULT_ROPE_BASE, float(f"{fitted:.2g}"), fitted):
        if torch.allclose(exact, base**exponents, rtol=tolerance, atol=0):
            return base
    return None


def compute_periods(ours: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor | None:
    """Compute the periods [d / 4] of a ViT whose weights do not hold them; None if its heads cannot be inferred.

    Args:
        ours: the other entries, in our names.
        config: see `read_settings`; what it does not set is as in the published models.

    Raises:
        WeightsError: the configuration makes no sense.
    """
    dim = ours["cls_token"].shape[-1]
    published = published_vit_of_size(ours)
    settings = read_settings(config)
    heads = settings.get("num_heads")
    if heads is None:
        heads = published.num_heads if published else max(1, dim // USUAL_HEAD_DIM)
        if dim % (4 * heads):
            return None
    if dim % (4 * heads):
        raise WeightsError(f"the configuration names {heads:g} heads, which do not fit a model of {dim} channels")
    shortest, longest = settings.get("pos_embed_rope_min_period"), settings.get("pos_embed_rope_max_period")
    base = settings.get("pos_embed_rope_base", DEFAULT_ROPE_BASE) if None in (shortest, longest) else None
    if base is not None:
        shortest = longest = None
    rope = RopePositionEmbedding(dim, num_heads=heads, base=base, min_period=shortest, max_period=longest, device="cpu")
    return rope.periods


def read_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a model that its weights do not show, by the arguments of `DinoVisionTransformer`.

    Args:
        config: of transformers, timm or a trainer like ours, nested or by names joined with dots. What it does not set,
            or sets to several values, is left out.

    Returns:
        Some of `SETTINGS`.

    Raises:
        WeightsError: a value makes no sense.
    """
    given: dict[str, list[Any]] = {}
    for path, value in flatten(config, source="the configuration").items():
        name = path.rpartition(".")[2]
        setting = next((setting for setting, names in SETTINGS.items() if name in names), None)
        if setting is None or not isinstance(value, str | int | float):
            continue  # Of another meaning: a function, or one value for each of several stages.
        if setting in _CHOICES:
            if value not in _CHOICES[setting]:
                continue  # Of another trainer.
        elif not isinstance(value, int if setting == "num_heads" else (int, float)) or value is True or value <= 0:
            raise WeightsError(f"the configuration has {name}={value!r}, expected a positive number")
        if value not in given.setdefault(setting, []):
            given[setting].append(value)
    return {setting: values[0] for setting, values in given.items() if len(values) == 1}
