"""The published backbones by name, for `torch.hub` and for Python.

Notable:
- Models come back in evaluation mode, with all parameters trainable. In training mode their positions are rescaled at
  random, so that two forwards of one image differ.
- Which norms a model has is read off the weights, so files may have any name.
- With `dtype=torch.bfloat16` a bfloat16 file stays mapped as it is; the positions are computed in float32 all the same.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor

from dinov3.hub.architectures import (
    PUBLISHED_CONVNEXTS,
    PUBLISHED_VITS,
    UNTIED_CLS_NORM,
    PublishedConvNeXt,
    PublishedViT,
    has_untied_cls_norm,
)
from dinov3.hub.sources import BASE_URL, convert_path_or_url_to_url, is_download, is_url, locate
from dinov3.hub.weights import WeightsError, backbone_entries, load_backbone_, read_state_dict
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer
from dinov3.utils.dtype import as_torch_dtype

__all__ = [
    "Weights",
    "convert_path_or_url_to_url",
    "dinov3_convnext_base",
    "dinov3_convnext_large",
    "dinov3_convnext_small",
    "dinov3_convnext_tiny",
    "dinov3_vit7b16",
    "dinov3_vitb16",
    "dinov3_vith16plus",
    "dinov3_vitl16",
    "dinov3_vitl16plus",
    "dinov3_vits16",
    "dinov3_vits16plus",
    "is_url",
]


class Weights(Enum):
    """The data that published weights were trained on."""

    LVD1689M = "LVD1689M"
    SAT493M = "SAT493M"


WeightsLike = Weights | str | os.PathLike[str] | Mapping[str, Tensor]

#: Entries with several published versions of their weights.
VERSIONED = ("dinov3_vitl16plus", "dinov3_vith16plus")
FILE_OPTIONS = ("hash", "version", "mmap", "progress")
PLACE_OPTIONS = ("device", "dtype")
#: Options of the models that change neither their weights nor, but for `patch_size`, what they compute in evaluation.
VIT_OPTIONS = (
    "drop_path_rate",
    "pos_embed_rope_shift_coords",
    "pos_embed_rope_jitter_coords",
    "pos_embed_rope_rescale_coords",
)
CONVNEXT_OPTIONS = ("drop_path_rate", "patch_size")

_ARGUMENTS = """

    Args:
        pretrained: load `weights`; if False, initialise at random and read nothing.
        weights: {weights}, or its name.
            Or a local path or file:// URL, read where it lies: keep it in place while the model lives. It is told by
            its content: a file in the published layout (.pth or .safetensors); the teacher of a training, as a file or
            as a directory of torch.distributed.checkpoint; a DINOv3 model of Hugging Face transformers or of timm, as
            the directory of the model, a file of its weights or the index of several.
            Or an https:// URL, downloaded once into torch.hub's cache. Or a state dict in any of these layouts.
        check_hash: compare the file with the SHA-256 digits at the end of its name.
        **kwargs: `device`; `dtype`, floating point or its name, of all parameters (by default float32): images must
            have it too, or the call be under autocast.
            {options}
            Of the file: `mmap=False` reads a local file instead of mapping it, `progress=False` hides the bar of a
            download, `hash` and `version` choose another published file.

    Returns:
        A `{model}` in evaluation mode, its parameters trainable, on the CPU unless `device` is given.

    Raises:
        FileNotFoundError: there is no such local file.
        ValueError: there are no such published weights, or the file is not a checkpoint of this model.
        ConnectionError: the download failed.
        TypeError: an unknown keyword, or one that this model fixes.
    """
_VIT_ARGUMENTS = _ARGUMENTS.format(
    weights="`Weights.LVD1689M` (web images) or, where published, `Weights.SAT493M` (satellite images)",
    options="""Of the model: `drop_path_rate`, `pos_embed_rope_shift_coords`, `pos_embed_rope_jitter_coords`,
            `pos_embed_rope_rescale_coords`, which act in training mode alone.""",
    model="DinoVisionTransformer",
)
_CONVNEXT_ARGUMENTS = _ARGUMENTS.format(
    weights="`Weights.LVD1689M` (web images)",
    options="""Of the model: `patch_size`, to which `get_intermediate_layers` resizes its maps; `drop_path_rate`, which
            acts in training mode alone.""",
    model="ConvNeXt",
)

Entry = TypeVar("Entry", bound=Callable[..., Any])
Backbone = TypeVar("Backbone", DinoVisionTransformer, ConvNeXt)


def _with_arguments_documented(entry: Entry) -> Entry:
    is_convnext = entry.__name__ in PUBLISHED_CONVNEXTS
    entry.__doc__ = (entry.__doc__ or "") + (_CONVNEXT_ARGUMENTS if is_convnext else _VIT_ARGUMENTS)
    return entry


@_with_arguments_documented
def dinov3_vits16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-S/16: 21.6 M parameters, 384 channels, 12 blocks."""
    return _make(DinoVisionTransformer, "dinov3_vits16", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_vits16plus(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-S+/16: 28.7 M parameters, 384 channels, 12 blocks, SwiGLU."""
    return _make(DinoVisionTransformer, "dinov3_vits16plus", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_vitb16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-B/16: 85.7 M parameters, 768 channels, 12 blocks."""
    return _make(DinoVisionTransformer, "dinov3_vitb16", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_vitl16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-L/16: 303 M parameters, 1024 channels, 24 blocks; weights LVD1689M and SAT493M."""
    return _make(DinoVisionTransformer, "dinov3_vitl16", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_vitl16plus(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-L+/16: 404 M parameters, 1024 channels, 24 blocks, SwiGLU."""
    return _make(DinoVisionTransformer, "dinov3_vitl16plus", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_vith16plus(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-H+/16: 841 M parameters, 1280 channels, 32 blocks, SwiGLU."""
    return _make(DinoVisionTransformer, "dinov3_vith16plus", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_vit7b16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-7B/16: 6716 M parameters, 4096 channels, 40 blocks, SwiGLU; weights LVD1689M and SAT493M."""
    return _make(DinoVisionTransformer, "dinov3_vit7b16", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_convnext_tiny(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> ConvNeXt:
    """DINOv3 ConvNeXt-T: 27.8 M parameters, 768 channels, 18 blocks, stride 32."""
    return _make(ConvNeXt, "dinov3_convnext_tiny", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_convnext_small(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> ConvNeXt:
    """DINOv3 ConvNeXt-S: 49.5 M parameters, 768 channels, 36 blocks, stride 32."""
    return _make(ConvNeXt, "dinov3_convnext_small", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_convnext_base(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> ConvNeXt:
    """DINOv3 ConvNeXt-B: 87.6 M parameters, 1024 channels, 36 blocks, stride 32."""
    return _make(ConvNeXt, "dinov3_convnext_base", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_convnext_large(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> ConvNeXt:
    """DINOv3 ConvNeXt-L: 196 M parameters, 1536 channels, 36 blocks, stride 32."""
    return _make(ConvNeXt, "dinov3_convnext_large", pretrained, weights, check_hash, kwargs)


def url_of(entry: str, weights: Weights, *, version: str | None = None, file_hash: str | None = None) -> str:
    """Where published weights are.

    Args:
        entry: name of the hub entry, e.g. `dinov3_vits16`.
        weights: the data that they were trained on, one of those published for this entry.
        version: added to the file name.
        file_hash: first digits of the SHA-256 in the file name; None: those of the published file.
    """
    suffix = f"_{version}" if version else ""
    file_hash = file_hash or _published(entry).hashes[weights.name]
    return f"{BASE_URL}/{entry}/{entry}_pretrain_{weights.name.lower()}{suffix}-{file_hash}.pth"


def _make(
    model_class: type[Backbone],
    entry: str,
    pretrained: bool,
    weights: WeightsLike,
    check_hash: bool,
    kwargs: dict[str, Any],
) -> Backbone:
    _check_keywords(model_class, entry, kwargs)
    published = _published(entry)
    data = _published_data(entry, weights)
    dtype = _floating_dtype(entry, kwargs.get("dtype"))
    device = kwargs.get("device")
    options = published.options() | {k: v for k, v in kwargs.items() if k in _model_options(model_class)}
    if not pretrained:
        if data is None:
            raise ValueError(f"{entry}: weights are given, but pretrained=False reads none; leave out one of the two")
        model = _on_meta(model_class, options, untied=_is_untied(published, data))
        # Built on the meta device, because constructors would initialise everything a first time.
        place = torch.device(device or torch.get_default_device())
        if place.type != "meta":
            model.to_empty(device=place)
            model.init_weights()
        return _cast(model, dtype).eval()  # Cast last: random numbers of few bits have another distribution.
    state, source = _read(entry, data or weights, check_hash, kwargs)
    untied = _is_untied(published, data) if data else has_untied_cls_norm(state)
    model = _cast(_on_meta(model_class, options, untied=untied), dtype)
    load_backbone_(model, state, source=source, target=entry)
    return model.to(device).eval()


def _published(entry: str) -> PublishedViT | PublishedConvNeXt:
    return PUBLISHED_VITS[entry] if entry in PUBLISHED_VITS else PUBLISHED_CONVNEXTS[entry]


def _is_untied(published: PublishedViT | PublishedConvNeXt, data: Weights) -> bool:
    return isinstance(published, PublishedViT) and data.name in published.untied


def _on_meta(model_class: type[Backbone], options: dict[str, Any], *, untied: bool) -> Backbone:
    if model_class is DinoVisionTransformer:
        options = options | {UNTIED_CLS_NORM: untied}
    with torch.device("meta"):
        return model_class(**options)


def _cast(model: Backbone, dtype: torch.dtype | None) -> Backbone:
    if dtype is None:
        return model
    if isinstance(model, ConvNeXt):
        return model.to(dtype)
    periods = model.rope_embed.periods
    model.to(dtype)
    model.rope_embed.periods = periods  # Positions are computed in float32, as after training in low precision.
    return model


def _floating_dtype(entry: str, dtype: Any) -> torch.dtype | None:
    if dtype is None:
        return None
    try:
        found = as_torch_dtype(dtype)
    except KeyError:
        found = torch.bool
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{entry}: dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    return found


def _published_data(entry: str, weights: WeightsLike) -> Weights | None:
    if isinstance(weights, str) and weights.upper() in Weights.__members__:
        weights = Weights[weights.upper()]
    if not isinstance(weights, Weights):
        return None
    available = _published(entry).hashes
    if weights.name not in available:
        raise ValueError(f"{entry} was not published with weights {weights.name}, only with {', '.join(available)}")
    return weights


def _read(entry: str, weights: WeightsLike, check_hash: bool, kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    if not isinstance(weights, Weights) and (kwargs.get("hash") or kwargs.get("version")):
        raise ValueError(f"{entry}: hash and version choose among published files, but weights are given")
    if isinstance(weights, Mapping):
        entries = backbone_entries(weights, source="the state dict")
        for name, tensor in entries.items():
            entries[name] = tensor.clone()  # Because the model takes its tensors over.
        return entries, "the state dict"
    if isinstance(weights, Weights):
        weights = url_of(entry, weights, version=kwargs.get("version"), file_hash=kwargs.get("hash"))
    if not isinstance(weights, str | os.PathLike):
        raise TypeError(f"{entry}: weights must be a Weights, a path, a URL or a state dict, got {weights!r}")
    path = locate(weights, check_hash=check_hash, progress=kwargs.get("progress", True))
    try:
        return read_state_dict(path, mmap=kwargs.get("mmap", True)), str(path)
    except WeightsError as error:
        if is_download(weights):
            raise WeightsError(f"{error} (It lies in the cache: delete it there to download it again.)") from error
        raise


def _model_options(model_class: type[DinoVisionTransformer] | type[ConvNeXt]) -> tuple[str, ...]:
    return CONVNEXT_OPTIONS if model_class is ConvNeXt else VIT_OPTIONS


def _check_keywords(
    model_class: type[DinoVisionTransformer] | type[ConvNeXt], entry: str, kwargs: dict[str, Any]
) -> None:
    optional = (*PLACE_OPTIONS, *_model_options(model_class), *FILE_OPTIONS)
    constructor = inspect.signature(model_class).parameters
    for name, value in kwargs.items():
        if name == "version" and value is not None and entry not in VERSIONED:
            raise TypeError(f"{entry}: there is only one version of its weights, got version={value!r}")
        if name in optional:
            continue
        if name in constructor and constructor[name].kind is not inspect.Parameter.VAR_KEYWORD:
            fixed = _published(entry).options() | {UNTIED_CLS_NORM: "given by the weights"}
            raise TypeError(f"{entry} fixes {name} ({fixed.get(name, constructor[name].default)}): leave it out")
        known = ["pretrained", "weights", "check_hash", *optional]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
        raise TypeError(f"{entry} has no keyword argument {name!r}; {hint}")
