"""Weights in the layouts of Hugging Face transformers and timm: recognised, and converted to our names and back.

Notable:
- A layout is told by the names of its entries, so that a file may be called anything and lie anywhere.
- Both libraries compute the rotary periods, fix the bias of the keys to zero, and know nothing of bias masks or of the
  norm for local crops; timm has no mask token. What they have no place for travels in the metadata of the safetensors
  file, so that converting there and back changes no bit.
- Tensors are shared with what went in wherever only their names change. Of a ViT in Hugging Face's layout, queries,
  keys and values are joined, which copies them; the other way they are views.
"""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dinov3.hub.architectures import PUBLISHED_VITS, PublishedViT, count_blocks
from dinov3.hub.files import (
    SAFETENSORS_DTYPES,
    WeightsError,
    is_safetensors,
    read_file,
    read_safetensors_header,
)
from dinov3.layers import RopePositionEmbedding

Library = Literal["huggingface", "timm"]
State = dict[str, Tensor]

#: Under this name the metadata of a safetensors file holds what the layout has no place for.
METADATA_KEY = "dinov3"
#: Far above what the small entries of the largest model take: metadata cannot fill the memory.
MAX_KEPT_BYTES = 64 * 2**20
CONFIG_FILE = "config.json"
INDEX_SUFFIX = ".safetensors.index.json"
#: Files with the weights of a model directory, in the order in which they are looked for.
WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
MODEL_TYPES = {"dinov3_vit": "vit", "dinov3_convnext": "convnext"}
#: Of the published ViTs; both libraries use the same, and it is not written in the weights.
LAYER_NORM_EPS = {"vit": 1e-5, "convnext": 1e-6}
DEFAULT_ROPE_BASE = 100.0
USUAL_HEAD_DIM = 64

# A name with {} for each index, or the name of a module, then with the names of its weight and bias as they are.
_VIT_TO_HUGGINGFACE = {
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
_VIT_TO_TIMM = {
    "cls_token": "cls_token",
    "storage_tokens": "reg_token",
    "patch_embed.proj": "patch_embed.proj",
    "blocks.{}.norm1": "blocks.{}.norm1",
    "blocks.{}.norm2": "blocks.{}.norm2",
    "blocks.{}.attn.qkv.weight": "blocks.{}.attn.qkv.weight",
    "blocks.{}.attn.proj": "blocks.{}.attn.proj",
    "blocks.{}.ls1.gamma": "blocks.{}.gamma_1",
    "blocks.{}.ls2.gamma": "blocks.{}.gamma_2",
    "norm": "norm",
}
# `up_proj` and `fc2` mean another layer in a gated FFN than in a plain one.
_FFN_TO: dict[Library, dict[bool, dict[str, str]]] = {
    "huggingface": {
        False: {
            "blocks.{}.mlp.fc1": "layer.{}.mlp.up_proj",
            "blocks.{}.mlp.fc2": "layer.{}.mlp.down_proj",
        },
        True: {
            "blocks.{}.mlp.w1": "layer.{}.mlp.gate_proj",
            "blocks.{}.mlp.w2": "layer.{}.mlp.up_proj",
            "blocks.{}.mlp.w3": "layer.{}.mlp.down_proj",
        },
    },
    "timm": {
        False: {
            "blocks.{}.mlp.fc1": "blocks.{}.mlp.fc1",
            "blocks.{}.mlp.fc2": "blocks.{}.mlp.fc2",
        },
        True: {
            "blocks.{}.mlp.w1": "blocks.{}.mlp.fc1_g",
            "blocks.{}.mlp.w2": "blocks.{}.mlp.fc1_x",
            "blocks.{}.mlp.w3": "blocks.{}.mlp.fc2",
        },
    },
}
_CONVNEXT_TO: dict[Library, dict[str, str]] = {
    "huggingface": {
        "downsample_layers.{}.{}": "stages.{}.downsample_layers.{}",
        "stages.{}.{}.dwconv": "stages.{}.layers.{}.depthwise_conv",
        "stages.{}.{}.norm": "stages.{}.layers.{}.layer_norm",
        "stages.{}.{}.pwconv1": "stages.{}.layers.{}.pointwise_conv1",
        "stages.{}.{}.pwconv2": "stages.{}.layers.{}.pointwise_conv2",
        "stages.{}.{}.gamma": "stages.{}.layers.{}.gamma",
        "norm": "layer_norm",
    },
    "timm": {
        "downsample_layers.0.0": "stem.0",
        "downsample_layers.0.1": "stem.1",
        "downsample_layers.{}.{}": "stages.{}.downsample.{}",
        "stages.{}.{}.dwconv": "stages.{}.blocks.{}.conv_dw",
        "stages.{}.{}.norm": "stages.{}.blocks.{}.norm",
        "stages.{}.{}.pwconv1": "stages.{}.blocks.{}.mlp.fc1",
        "stages.{}.{}.pwconv2": "stages.{}.blocks.{}.mlp.fc2",
        "stages.{}.{}.gamma": "stages.{}.blocks.{}.gamma",
        "norm": "head.norm",
    },
}
#: Classifiers that a fine-tuned model may have on top.
_CLASSIFIERS = ("head.weight", "head.bias", "head.fc.", "classifier.")


@dataclass(frozen=True)
class Layout:
    """How weights are named.

    Attributes:
        library: whose names.
        family: which kind of model.
        prefix: before all names of the backbone, where it is a part of a larger model.
    """

    library: Library
    family: Literal["vit", "convnext"]
    prefix: str = ""

    def __str__(self) -> str:
        return {"huggingface": "Hugging Face transformers", "timm": "timm"}[self.library]


@dataclass(frozen=True)
class Foreign:
    """Weights in the layout of another library.

    Attributes:
        state: the entries, by that library's names.
        kept: metadata for the safetensors file: what the layout has no place for, in text.
    """

    state: State
    kept: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Content:
    """What a weights file holds, with what lies beside it.

    Attributes:
        entries: as they are.
        metadata: of the safetensors files.
        config: the content of the `config.json` of transformers or timm in the same directory; empty if there is none.
    """

    entries: Mapping[str, Any]
    metadata: dict[str, str]
    config: dict[str, Any]


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


def detect(names: Iterable[str]) -> Layout | None:
    """Which other library's layout the names of a state dict belong to; None: none of them."""
    names = set(names)
    for name in names:
        if name.endswith("embeddings.patch_embeddings.weight"):
            return Layout("huggingface", "vit", name.removesuffix("embeddings.patch_embeddings.weight"))
        if name.endswith("stages.0.downsample_layers.0.weight"):
            prefix = name.removesuffix("stages.0.downsample_layers.0.weight")
            # In memory, "model." is a level of the backbone that its final norm is not on.
            return Layout("huggingface", "convnext", prefix.removesuffix("model."))
    if "reg_token" in names or "blocks.0.gamma_1" in names:
        return Layout("timm", "vit")
    if {"stem.0.weight", "stages.0.blocks.0.conv_dw.weight"} <= names:
        return Layout("timm", "convnext")
    return None


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
    theirs = _own_entries(state, layout)
    if layout.family == "convnext":
        ours = _convnext_to_release(theirs, layout)
    else:
        ours = _vit_to_release(theirs, layout, config or {})
    return Converted(_with_kept(ours, (metadata or {}).get(METADATA_KEY)), layout, config or {})


def from_release(state: Mapping[str, Tensor], library: Library) -> Foreign:
    """Weights in the names of another library, of a backbone in ours.

    Args:
        state: a complete state dict of a ViT or ConvNeXt.
        library: whose names.

    Raises:
        WeightsError: that library's models cannot compute the same.
    """
    if "downsample_layers.0.0.weight" in state:
        theirs = _rename(_without_aliases(state), _CONVNEXT_TO[library])
        back = _convnext_to_release(theirs, Layout(library, "convnext"))
    else:
        _check_representable(state, library)
        theirs = _vit_from_release(state, library)
        # Those entries are never changed, and joining them again would only take memory.
        small = {name: t for name, t in theirs.items() if not re.search(r"\.([qkv]_proj|qkv)\.weight$", name)}
        back = _vit_to_release(small, Layout(library, "vit"), {})
        back |= {name: tensor for name, tensor in state.items() if name.endswith(".qkv.weight")}
    kept = {name: tensor for name, tensor in state.items() if name not in back or not _is_same(tensor, back[name])}
    absent = [name for name in back if name not in state]
    return Foreign(theirs, {METADATA_KEY: _pack(kept, absent)} if kept or absent else {})


def read_content(path: Path, *, mmap: bool = True) -> Content:
    """Read a weights file of any format, or a directory as transformers and timm save it.

    Args:
        path: a PyTorch checkpoint, a safetensors file, the index of a sharded one, or a directory with `config.json`
            and one of these.
        mmap: map the weights into memory instead of reading them.

    Raises:
        WeightsError: there are no weights, they are damaged, or are those of something else.
    """
    if path.is_dir():
        config = _read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else None
        if config is not None:
            check_config(config, path)
        content = read_content(_weights_file(path), mmap=mmap)
        if config is not None and not _agrees(config, content.entries):
            raise WeightsError(
                f"{path} contradicts itself: its {CONFIG_FILE} is that of a model of {_size(config)} channels, its "
                "weights are not; fetch the two again"
            )
        return Content(content.entries, content.metadata, config or {})
    if path.suffix == ".json":
        return _read_sharded(path, mmap=mmap)
    entries = read_file(path, mmap=mmap)
    metadata = read_safetensors_header(path).metadata if is_safetensors(path) else {}
    return Content(entries, metadata, _config_beside(path, entries))


def check_config(config: Mapping[str, Any], source: Path) -> None:
    """Refuse the configuration of another model.

    Raises:
        WeightsError: it is not one of a DINOv3 backbone, in transformers or in timm.
    """
    model_type, architecture = config.get("model_type"), str(config.get("architecture", ""))
    if model_type in MODEL_TYPES or "dinov3" in architecture or architecture.startswith("convnext_"):
        return
    found = f"model_type {model_type!r}" if model_type else f"architecture {architecture!r}" if architecture else None
    raise WeightsError(
        f"{source} does not hold a DINOv3 backbone: its {CONFIG_FILE} names "
        + (found or "neither a model_type nor an architecture")
        + f"; expected the model_type {' or '.join(MODEL_TYPES)} of transformers, or a DINOv3 architecture of timm"
    )


def is_model_directory(path: Path) -> bool:
    """Whether a directory looks like a model of transformers or timm."""
    return (path / CONFIG_FILE).is_file() or any(path.glob("*.safetensors")) or (path / WEIGHTS_FILES[-1]).is_file()


def rope_base(periods: Tensor) -> float | None:
    """The base of which `periods` [d / 4] are the powers, up to their rounding; None if they are not such powers."""
    exact, n = periods.detach().double().cpu(), len(periods)
    # Published files hold periods that were rounded to bfloat16, whatever their dtype is now.
    roundings = ((torch.bfloat16, 2**-8), (torch.float16, 2**-10), (torch.float64, 1e-5))
    tolerance = next(tolerance for dtype, tolerance in roundings if torch.equal(exact.to(dtype).double(), exact))
    exponents = torch.arange(n, dtype=torch.float64) / n
    fitted = float((exponents @ exact.log() / (exponents @ exponents).clamp_min(1e-9)).exp())
    for base in (DEFAULT_ROPE_BASE, float(f"{fitted:.2g}"), fitted):
        if torch.allclose(exact, base**exponents, rtol=tolerance, atol=0):
            return base
    return None


def effective_bias(state: Mapping[str, Tensor], block: str) -> Tensor | None:
    """The bias [3 D] of queries, keys and values after its mask; None if there is none.

    Args:
        state: a ViT in our names.
        block: the block's name, e.g. `blocks.0`.
    """
    bias, mask = state.get(f"{block}.attn.qkv.bias"), state.get(f"{block}.attn.qkv.bias_mask")
    return bias if bias is None or mask is None else bias * mask.to(bias.dtype)


def _own_entries(state: Mapping[str, Tensor], layout: Layout) -> State:
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


def _rename(state: Mapping[str, Tensor], table: Mapping[str, str]) -> State:
    return {_renamed(name, table): tensor for name, tensor in state.items()}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    indices = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    for pattern in (name, re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", name)):
        module, _, leaf = pattern.rpartition(".")
        if pattern in table:
            return table[pattern].format(*indices)
        if module in table and leaf in ("weight", "bias"):
            return f"{table[module].format(*indices)}.{leaf}"
    return name


def _convnext_to_release(theirs: State, layout: Layout) -> State:
    ours = _rename(theirs, {new: old for old, new in _CONVNEXT_TO[layout.library].items()})
    return ours | {f"norms.3.{leaf}": ours[f"norm.{leaf}"] for leaf in ("weight", "bias") if f"norm.{leaf}" in ours}


def _without_aliases(state: Mapping[str, Tensor]) -> State:
    # Of the two names of the final norm, loading lets the second win.
    aliases = {name.replace("norms.3.", "norm."): tensor for name, tensor in state.items() if name.startswith("norms.")}
    return {name: tensor for name, tensor in state.items() if not name.startswith("norms.")} | aliases


def _vit_from_release(state: Mapping[str, Tensor], library: Library) -> State:
    is_gated = "blocks.0.mlp.w1.weight" in state
    table = (_VIT_TO_HUGGINGFACE if library == "huggingface" else _VIT_TO_TIMM) | _FFN_TO[library][is_gated]
    without = re.compile(r"rope_embed\.|local_cls_norm\.|mask_token|.*\.qkv\.")
    theirs = _rename({name: tensor for name, tensor in state.items() if not without.match(name)}, table)
    weights = {name: tensor for name, tensor in state.items() if name.endswith(".qkv.weight")}
    if library == "timm":
        return theirs | _rename(weights, table) | _biases_from_release(state, "blocks.{}.attn.{}_bias")
    theirs["embeddings.mask_token"] = state["mask_token"].unsqueeze(1)
    if "storage_tokens" not in state:
        theirs["embeddings.register_tokens"] = state["cls_token"][:, :0]
    for block in range(len(weights)):
        for part, weight in zip("qkv", weights[f"blocks.{block}.attn.qkv.weight"].chunk(3), strict=True):
            theirs[f"layer.{block}.attention.{part}_proj.weight"] = weight
    # There, the published models have biases also if they are zero; timm has models with and without them.
    return theirs | _biases_from_release(state, "layer.{}.attention.{}_proj.bias", keep_zeros=True)


def _biases_from_release(state: Mapping[str, Tensor], name: str, *, keep_zeros: bool = False) -> State:
    biases = {block: bias.chunk(3) for block, bias in _effective_biases(state).items()}
    has_q, has_k, has_v = (any(bool(parts[i].any()) for parts in biases.values()) for i in range(3))
    is_wanted = {"q": keep_zeros or has_q or has_v, "k": has_k, "v": keep_zeros or has_q or has_v}
    return {
        name.format(block, letter): part
        for block, parts in biases.items()
        for letter, part in zip("qkv", parts, strict=True)
        if is_wanted[letter]
    }


def _effective_biases(state: Mapping[str, Tensor]) -> dict[int, Tensor]:
    biases = {block: effective_bias(state, f"blocks.{block}") for block in range(count_blocks(state))}
    return {block: bias for block, bias in biases.items() if bias is not None}


def _check_representable(state: Mapping[str, Tensor], library: Library) -> None:
    layout = Layout(library, "vit")
    reasons = {
        "a norm of its own for class and storage tokens (cls_norm)": "cls_norm.weight" in state,
        "RMS norms": "norm.bias" not in state,
        "no layer scales": "blocks.0.ls1.gamma" not in state,
        "periods that are no powers of one base": rope_base(state["rope_embed.periods"]) is None,
    }
    if library == "timm":
        keys = [bias.chunk(3)[1] for bias in _effective_biases(state).values()]
        reasons["a bias of the keys that is not zero"] = any(bool(bias.any()) for bias in keys)
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise WeightsError(f"the model has {' and '.join(found)}, which the DINOv3 models of {layout} cannot have")


def _vit_to_release(theirs: State, layout: Layout, config: Mapping[str, Any]) -> State:
    gate = "layer.0.mlp.gate_proj.weight" if layout.library == "huggingface" else "blocks.0.mlp.fc1_g.weight"
    table = _VIT_TO_HUGGINGFACE if layout.library == "huggingface" else _VIT_TO_TIMM
    table = table | _FFN_TO[layout.library][gate in theirs]
    ours = _rename(theirs, {new: old for old, new in table.items()})
    if layout.library == "huggingface":
        ours = _with_joined_qkv(ours)
        if ours.get("mask_token", torch.empty(0)).ndim == 3:
            ours["mask_token"] = ours["mask_token"].squeeze(1)
        if "storage_tokens" in ours and ours["storage_tokens"].numel() == 0:
            del ours["storage_tokens"]
    else:
        ours = _with_timm_biases(ours)
    if "cls_token" not in ours:
        return ours
    if layout.library == "timm":
        ours["mask_token"] = torch.zeros_like(ours["cls_token"][0])
    periods = _periods(ours, config)
    return ours if periods is None else {**ours, "rope_embed.periods": periods}


def _with_joined_qkv(ours: State) -> State:
    joined: State = {}
    for block in range(count_blocks(ours, r"layer\.(\d+)\.")):
        start = f"layer.{block}.attention."
        weights = [ours[name] for part in "qkv" if (name := f"{start}{part}_proj.weight") in ours]
        if len({weight.shape for weight in weights}) == 1 and len(weights) == 3:
            joined[f"blocks.{block}.attn.qkv.weight"] = torch.cat(weights)
        joined |= _joined_bias(f"blocks.{block}", *(ours.get(f"{start}{part}_proj.bias") for part in "qkv"))
    rest = {name: tensor for name, tensor in ours.items() if not re.fullmatch(r"layer\.\d+\..*\.[qkv]_proj\.\w+", name)}
    return rest | joined


def _with_timm_biases(ours: State) -> State:
    published = _published_like(ours) if "cls_token" in ours else None
    joined: State = {}
    for block in range(count_blocks(ours)):
        q, k, v = (ours.get(f"blocks.{block}.attn.{part}_bias") for part in "qkv")
        if q is None and v is None and "cls_token" in ours and (published is None or published.qkv_bias):
            q = torch.zeros_like(ours["cls_token"][0, 0])
        joined |= _joined_bias(f"blocks.{block}", q, k, v)
    rest = {name: tensor for name, tensor in ours.items() if not re.fullmatch(r"blocks\.\d+\.attn\.[qkv]_bias", name)}
    return rest | joined


def _joined_bias(block: str, q: Tensor | None, k: Tensor | None, v: Tensor | None) -> State:
    given = [bias for bias in (q, k, v) if bias is not None]
    if not given:
        return {}
    zero, one = torch.zeros_like(given[0]), torch.ones_like(given[0])
    q, k, v = (zero if bias is None else bias for bias in (q, k, v))
    return {
        f"{block}.attn.qkv.bias": torch.cat([q, k, v]),
        f"{block}.attn.qkv.bias_mask": torch.cat([one, one if bool(k.any()) else zero, one]),
    }


def _published_like(ours: Mapping[str, Tensor]) -> PublishedViT | None:
    sizes = ours["cls_token"].shape[-1], count_blocks(ours)
    return next((vit for vit in PUBLISHED_VITS.values() if (vit.embed_dim, vit.depth) == sizes), None)


def _periods(ours: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor | None:
    dim = ours["cls_token"].shape[-1]
    published = _published_like(ours)
    heads = _setting(config, "num_attention_heads", "num_heads", int)
    base = _setting(config, "rope_theta", "rope_temperature", float)
    if heads is None:
        heads = published.num_heads if published else max(1, dim // USUAL_HEAD_DIM)
        if dim % (4 * heads):
            return None
    if dim % (4 * heads):
        raise WeightsError(f"the {CONFIG_FILE} names {heads:g} heads, which do not fit a model of {dim} channels")
    return RopePositionEmbedding(dim, num_heads=int(heads), base=base or DEFAULT_ROPE_BASE, device="cpu").periods


def _setting(config: Mapping[str, Any], name: str, timm_name: str, kind: type[int] | type[float]) -> float | None:
    """A number of a configuration, in the words of either library; None if it does not name it."""
    places = {timm_name: config.get("model_args"), name: config.get("rope_parameters")}
    found = config.get(name)
    for key, section in places.items():
        if found is None and isinstance(section, Mapping):
            found = section.get(key)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, (int, kind)) or found <= 0:
        raise WeightsError(f"the {CONFIG_FILE} has {name}={found!r}, expected a positive number")
    return found


def _is_same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return torch.equal(_as_bytes(a), _as_bytes(b))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _pack(kept: State, absent: list[str]) -> str:
    entries = {
        name: {
            "dtype": next(code for code, dtype in SAFETENSORS_DTYPES.items() if dtype == tensor.dtype),
            "shape": list(tensor.shape),
            "data": base64.b64encode(zlib.compress(bytes(_as_bytes(tensor).numpy()), 9)).decode(),
        }
        for name, tensor in kept.items()
    }
    return json.dumps({"kept": entries, "absent": absent})


def _with_kept(converted: State, packed: str | None) -> State:
    if packed is None:
        return converted
    try:
        content = json.loads(packed)
        kept = {name: _unpack(entry) for name, entry in content["kept"].items()}
        absent = set(content["absent"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, zlib.error) as error:
        raise WeightsError(
            f"the metadata {METADATA_KEY!r} of the safetensors file is damaged ({error!r}): what an earlier conversion "
            "put aside cannot be read; convert the original weights again"
        ) from error
    restored = {name: tensor for name, tensor in {**converted, **kept}.items() if name not in absent}
    # The weights may have been trained further since.
    blocks = {name.partition(".attn.")[0] for name in (*kept, *absent) if ".attn.qkv.bias" in name}
    for block in blocks:
        now, before = effective_bias(converted, block), effective_bias(restored, block)
        if now is not None and not (torch.equal(now, before) if before is not None else not now.any()):
            names = (f"{block}.attn.qkv.bias", f"{block}.attn.qkv.bias_mask")
            restored |= {name: converted[name] for name in names}
    return restored


def _unpack(entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
    size = math.prod(shape) * dtype.itemsize
    if not 0 <= size <= MAX_KEPT_BYTES:
        raise ValueError(f"{size} bytes")
    data = zlib.decompressobj().decompress(base64.b64decode(entry["data"]), size + 1)
    if len(data) != size:
        raise ValueError(f"expected {size} bytes")
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def _weights_file(directory: Path) -> Path:
    found = [directory / name for name in WEIGHTS_FILES if (directory / name).is_file()]
    others = sorted(directory.glob(f"*{INDEX_SUFFIX}")) or sorted(directory.glob("*.safetensors"))
    if found:
        return found[0]
    if len(others) == 1:
        return others[0]
    if others:
        raise WeightsError(
            f"{directory} holds several weights files: pass one of {', '.join(path.name for path in others[:10])}"
        )
    held = ", ".join(sorted(path.name for path in directory.iterdir())[:10])
    raise WeightsError(
        f"{directory} has a {CONFIG_FILE}, but no weights: expected {' or '.join(WEIGHTS_FILES[:2])}; it holds {held}: "
        "the download was not complete, or left out large files"
    )


def _read_sharded(index: Path, *, mmap: bool) -> Content:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not all(isinstance(name, str) for name in places.values()):
        raise WeightsError(
            f"{index} is not the index of a sharded checkpoint: it has no weight_map; expected "
            f"model{INDEX_SUFFIX}, or pass the directory"
        )
    files = sorted(set(places.values()))
    for name in files:
        if Path(name).name != name or name in ("", ".", ".."):
            raise WeightsError(f"{index} names a shard outside its directory, which is not read: {name!r}")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise WeightsError(
            f"{index.parent} lacks {len(missing)} of the {len(files)} shards that {index.name} names: "
            f"{', '.join(missing[:5])}; fetch them"
        )
    entries: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for name in files:
        shard = read_content(index.parent / name, mmap=mmap)
        wanted = {key for key, file in places.items() if file == name}
        if absent := sorted(wanted - set(shard.entries)):
            raise WeightsError(f"{index} names {absent[0]} as a part of {name}, but it is not there; fetch both again")
        entries |= {key: tensor for key, tensor in shard.entries.items() if key in wanted}
        metadata |= shard.metadata
    return Content(entries, metadata, _config_beside(index, entries))


def _config_beside(path: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    if not (path.parent / CONFIG_FILE).is_file():
        return {}
    try:
        config = _read_json(path.parent / CONFIG_FILE)
        check_config(config, path)
    except WeightsError:  # It need not have anything to do with this file.
        return {}
    return config if _agrees(config, entries) else {}


def _agrees(config: Mapping[str, Any], entries: Mapping[str, Any]) -> bool:
    tokens = [
        entries[name] for name in entries if name.endswith("cls_token") and isinstance(entries[name], torch.Tensor)
    ]
    size = _size(config)
    return size is None or all(tensor.shape[-1] == size for tensor in tokens)


def _size(config: Mapping[str, Any]) -> int | None:
    if config.get("model_type") == "dinov3_vit":
        return config.get("hidden_size")
    return config.get("num_features") if "dinov3" in str(config.get("architecture")) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON, or is damaged: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content
