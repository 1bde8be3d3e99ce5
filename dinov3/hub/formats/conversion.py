"""From any layout to our names, and from ours to another library's.

What the other library has no place for is written as text into the metadata of the safetensors file, where libraries
do not look. It is restored bit by bit when that file is converted again.
"""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dinov3.hub.formats import huggingface, timm
from dinov3.hub.formats.layouts import (
    Layout,
    Library,
    State,
    compute_periods,
    detect,
    inverted,
    masked_bias,
    rename,
    rope_base,
    select_backbone,
    split_biases,
)
from dinov3.utils.weight_files import SAFETENSORS_DTYPES, WeightsError

#: Under this name the metadata of a safetensors file holds what was not converted.
METADATA_KEY = "dinov3"
#: Far above what the small entries of the largest model take: metadata cannot fill the memory.
_MAX_UNCONVERTED_BYTES = 64 * 2**20

_LIBRARIES: dict[Library, Any] = {"huggingface": huggingface, "timm": timm}


@dataclass(frozen=True)
class Foreign:
    """Weights in the layout of another library.

    Attributes:
        state: the entries, by that library's names.
        metadata: for the safetensors file: as text, what the layout has no place for.
    """

    state: State
    metadata: dict[str, str] = field(default_factory=dict)


class Converted(dict[str, Tensor]):
    """A state dict in our names, with where they come from.

    Attributes:
        layout: of the other library that it came in; None if in ours.
        config: the configuration that came with it; empty if none did.
    """

    def __init__(self, state: Mapping[str, Tensor], layout: Layout | None, config: Mapping[str, Any]) -> None:
        super().__init__(state)
        self.layout = layout
        self.config = config


def to_release(
    state: Mapping[str, Tensor], *, config: Mapping[str, Any] | None = None, metadata: Mapping[str, str] | None = None
) -> State:
    """Return weights by our names, whatever layout they come in.

    Unknown entries keep their names, so that loading can complain about them. Heads of classifiers, and what does not
    belong to the backbone of a larger model, are left out. Of a ViT, the periods are computed if they are missing; the
    bias gets zeros for the keys and a mask that silences them (unless the keys have a bias that is not zero); without
    any bias (timm leaves out biases that are zero) it is zero, except in models that are published without one; a
    missing mask token is zero.

    Args:
        state: entries of Hugging Face transformers, timm, or ours, of which `register_tokens` may be another name.
        config: for what entries do not show, see `read_settings`.
        metadata: of the safetensors file, with what an earlier conversion could not convert.

    Returns:
        The tensors by our names, as a `Converted` if they had others or a configuration; tensors that need no
        conversion are the same objects.

    Raises:
        WeightsError: the metadata is damaged.
    """
    layout = detect(state)
    if layout is None:
        if isinstance(state, Converted):
            return state
        ours = rename(state, {"register_tokens": "storage_tokens"} if "cls_token" in state else {})
        return Converted(ours, None, config) if config else ours
    theirs = select_backbone(state, layout)
    if layout.family == "convnext":
        ours = _convnext_to_release(theirs, layout.library)
    else:
        ours = _vit_to_release(theirs, layout.library, config or {})
    return Converted(_restore(ours, metadata or {}), layout, config or {})


def from_release(state: Mapping[str, Tensor], library: Library) -> Foreign:
    """Return weights in the names of another library, of a backbone in ours.

    Args:
        state: a complete state dict of a ViT or ConvNeXt.
        library: whose names.

    Raises:
        WeightsError: that library's models cannot compute the same.
    """
    if "downsample_layers.0.0.weight" in state:
        # The final norm has two names, of which the second wins when the weights are loaded.
        aliases = {name.replace("norms.3.", "norm."): t for name, t in state.items() if name.startswith("norms.")}
        plain = {name: tensor for name, tensor in state.items() if not name.startswith("norms.")}
        theirs = rename(plain | aliases, _LIBRARIES[library].CONVNEXT)
        back = _convnext_to_release(theirs, library)
    else:
        _check_representable(state, library)
        theirs = _LIBRARIES[library].vit_from_release(state)
        # These entries never change, and joining them again would only take memory.
        small = {name: t for name, t in theirs.items() if not re.search(r"\.([qkv]_proj|qkv)\.weight$", name)}
        back = _vit_to_release(small, library, {})
        back |= {name: tensor for name, tensor in state.items() if name.endswith(".qkv.weight")}
    return Foreign(theirs, _put_aside(state, back))


def _convnext_to_release(theirs: State, library: Library) -> State:
    ours = rename(theirs, inverted(_LIBRARIES[library].CONVNEXT))
    return ours | {f"norms.3.{leaf}": ours[f"norm.{leaf}"] for leaf in ("weight", "bias") if f"norm.{leaf}" in ours}


def _vit_to_release(theirs: State, library: Library, config: Mapping[str, Any]) -> State:
    ours: State = _LIBRARIES[library].vit_to_release(theirs)
    periods = compute_periods(ours, config) if "cls_token" in ours else None
    return ours if periods is None else {**ours, "rope_embed.periods": periods}


def _check_representable(state: Mapping[str, Tensor], library: Library) -> None:
    reasons = {
        "a norm of its own for class and storage tokens (cls_norm)": "cls_norm.weight" in state,
        "RMS norms": "norm.bias" not in state,
        "no layer scales": "blocks.0.ls1.gamma" not in state,
        "periods that are not powers of one base": rope_base(state["rope_embed.periods"]) is None,
        "a bias of the keys that is not zero": (
            library == "timm" and any(name.endswith("k") for name in split_biases(state, "{}{}"))
        ),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        layout = Layout(library, "vit")
        raise WeightsError(f"the model has {' and '.join(found)}, which the DINOv3 models of {layout} cannot have")


def _put_aside(state: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> dict[str, str]:
    """Return metadata with how `state` differs from `back`, its conversion there and back; empty if they are equal."""
    changed = {name: tensor for name, tensor in state.items() if name not in back or not _is_same(tensor, back[name])}
    absent = [name for name in back if name not in state]
    if not changed and not absent:
        return {}
    return {METADATA_KEY: json.dumps({"kept": {name: _pack(t) for name, t in changed.items()}, "absent": absent})}


def _restore(back: State, metadata: Mapping[str, str]) -> State:
    """Return the state that `_put_aside` was given, unless biases were trained since: those win."""
    packed = metadata.get(METADATA_KEY)
    if packed is None:
        return back
    try:
        content = json.loads(packed)
        changed = {name: _unpack(entry) for name, entry in content["kept"].items()}
        absent = set(content["absent"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, zlib.error) as error:
        raise WeightsError(
            f"the metadata {METADATA_KEY!r} of the safetensors file is damaged ({error!r}), so entries that an earlier "
            "conversion saved there cannot be restored; convert the original weights again"
        ) from error
    restored = {name: tensor for name, tensor in {**back, **changed}.items() if name not in absent}
    for block in {name.partition(".attn.")[0] for name in (*changed, *absent) if ".attn.qkv.bias" in name}:
        now, before = masked_bias(back, block), masked_bias(restored, block)
        if now is not None and not (torch.equal(now, before) if before is not None else not now.any()):
            restored |= {name: back[name] for name in (f"{block}.attn.qkv.bias", f"{block}.attn.qkv.bias_mask")}
    return restored


def _is_same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return torch.equal(_as_bytes(a), _as_bytes(b))  # Bits, because NaN is not equal to itself.


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _pack(tensor: Tensor) -> dict[str, Any]:
    return {
        "dtype": next(code for code, dtype in SAFETENSORS_DTYPES.items() if dtype == tensor.dtype),
        "shape": list(tensor.shape),
        "data": base64.b64encode(zlib.compress(bytes(_as_bytes(tensor).numpy()), 9)).decode(),
    }


def _unpack(entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
    size = math.prod(shape) * dtype.itemsize
    if not 0 <= size <= _MAX_UNCONVERTED_BYTES:
        raise ValueError(f"{size} bytes")
    # Not more than promised: a small text can hold gigabytes of zeros.
    data = zlib.decompressobj().decompress(base64.b64decode(entry["data"]), size + 1)
    if len(data) != size:
        raise ValueError(f"expected {size} bytes")
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
