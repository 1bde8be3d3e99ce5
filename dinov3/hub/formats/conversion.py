"""From any layout to our names, and from ours to another library's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dinov3.hub.formats import huggingface, timm
from dinov3.hub.formats.biases import effective_biases
from dinov3.hub.formats.kept import keep, restore
from dinov3.hub.formats.layouts import Layout, Library, State, detect, inverted, own_entries, rename
from dinov3.hub.formats.positions import computed_periods, rope_base
from dinov3.utils.weight_files import WeightsError

_CONVNEXT = {"huggingface": huggingface.CONVNEXT, "timm": timm.CONVNEXT}
_VIT_TO_RELEASE = {"huggingface": huggingface.vit_to_release, "timm": timm.vit_to_release}
_VIT_FROM_RELEASE = {"huggingface": huggingface.vit_from_release, "timm": timm.vit_from_release}


@dataclass(frozen=True)
class Foreign:
    """Weights in the layout of another library.

    Attributes:
        state: the entries, by that library's names.
        kept: metadata for the safetensors file: what the layout has no place for, in text.
    """

    state: State
    kept: dict[str, str] = field(default_factory=dict)


class Converted(dict[str, Tensor]):
    """A state dict in our names that came in another library's.

    Attributes:
        layout: the one it came in.
        config: the configuration that came with it; empty if none did.
    """

    def __init__(self, state: Mapping[str, Tensor], layout: Layout, config: Mapping[str, Any]) -> None:
        super().__init__(state)
        self.layout = layout
        self.config = config


def to_release(
    state: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> State:
    """Weights in our names, whatever layout they come in.

    Entries that are not known keep their names, so that loading can complain about them; heads of classifiers, and what
    does not belong to the backbone of a larger model, are left out. Where a ViT has them: the periods are computed; the
    bias gets zeros for the keys and a mask that silences them (a bias of the keys that is not zero is kept); without
    any bias (timm leaves out biases that are zero) it is zero, except in models that are published without one; a
    missing mask token is zero.

    Args:
        state: entries of Hugging Face transformers, timm, or ours, which are returned as they are.
        config: the content of a `config.json`, for what the entries do not tell: heads and the base of the periods.
        metadata: of the safetensors file, with what an earlier conversion put aside.

    Returns:
        The tensors by our names, as a `Converted` if they had others; those that need no conversion are the same
        objects.

    Raises:
        WeightsError: what was put aside is damaged.
    """
    layout = detect(state)
    if layout is None:
        return state if isinstance(state, Converted) else dict(state)
    theirs = own_entries(state, layout)
    if layout.family == "convnext":
        ours = _convnext_to_release(theirs, layout.library)
    else:
        ours = _vit_to_release(theirs, layout.library, config or {})
    return Converted(restore(ours, metadata or {}), layout, config or {})


def from_release(state: Mapping[str, Tensor], library: Library) -> Foreign:
    """Weights in the names of another library, of a backbone in ours.

    Args:
        state: a complete state dict of a ViT or ConvNeXt.
        library: whose names.

    Raises:
        WeightsError: that library's models cannot compute the same.
    """
    if "downsample_layers.0.0.weight" in state:
        theirs = rename(_without_aliases(state), _CONVNEXT[library])
        back = _convnext_to_release(theirs, library)
    else:
        _check_representable(state, library)
        theirs = _VIT_FROM_RELEASE[library](state)
        # Those entries are never changed, and joining them again would only take memory.
        small = {name: t for name, t in theirs.items() if not re.search(r"\.([qkv]_proj|qkv)\.weight$", name)}
        back = _vit_to_release(small, library, {})
        back |= {name: tensor for name, tensor in state.items() if name.endswith(".qkv.weight")}
    return Foreign(theirs, keep(state, back))


def _convnext_to_release(theirs: State, library: Library) -> State:
    ours = rename(theirs, inverted(_CONVNEXT[library]))
    return ours | {f"norms.3.{leaf}": ours[f"norm.{leaf}"] for leaf in ("weight", "bias") if f"norm.{leaf}" in ours}


def _vit_to_release(theirs: State, library: Library, config: Mapping[str, Any]) -> State:
    ours = _VIT_TO_RELEASE[library](theirs)
    periods = computed_periods(ours, config) if "cls_token" in ours else None
    return ours if periods is None else {**ours, "rope_embed.periods": periods}


def _without_aliases(state: Mapping[str, Tensor]) -> State:
    # Of the two names of the final norm, loading lets the second win.
    aliases = {name.replace("norms.3.", "norm."): tensor for name, tensor in state.items() if name.startswith("norms.")}
    return {name: tensor for name, tensor in state.items() if not name.startswith("norms.")} | aliases


def _check_representable(state: Mapping[str, Tensor], library: Library) -> None:
    reasons = {
        "a norm of its own for class and storage tokens (cls_norm)": "cls_norm.weight" in state,
        "RMS norms": "norm.bias" not in state,
        "no layer scales": "blocks.0.ls1.gamma" not in state,
        "periods that are no powers of one base": rope_base(state["rope_embed.periods"]) is None,
    }
    if library == "timm":
        keys = [bias.chunk(3)[1] for bias in effective_biases(state).values()]
        reasons["a bias of the keys that is not zero"] = any(bool(bias.any()) for bias in keys)
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        layout = Layout(library, "vit")
        raise WeightsError(f"the model has {' and '.join(found)}, which the DINOv3 models of {layout} cannot have")
