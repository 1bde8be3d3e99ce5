"""The published backbones by name, for `torch.hub` and for Python.

Notable:
- Models come back in evaluation mode, with all parameters trainable. In training mode their positions are rescaled at
  random, so that two forwards of one image differ.
- Which norms a model has is read off the weights, so files may have any name.
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

from dinov3.hub.architectures import PUBLISHED_VITS, UNTIED_CLS_NORM, has_untied_cls_norm
from dinov3.hub.sources import BASE_URL, convert_path_or_url_to_url, is_url, locate
from dinov3.hub.weights import backbone_entries, load_backbone_, read_state_dict
from dinov3.models.vision_transformer import DinoVisionTransformer

__all__ = [
    "Weights",
    "convert_path_or_url_to_url",
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
#: Options of the model that change neither its weights nor what it computes in evaluation mode.
MODEL_OPTIONS = (
    "device",
    "drop_path_rate",
    "pos_embed_rope_shift_coords",
    "pos_embed_rope_jitter_coords",
    "pos_embed_rope_rescale_coords",
)

_ARGUMENTS = """

    Args:
        pretrained: load `weights`; if False, initialise at random and read nothing.
        weights: `Weights.LVD1689M` (web images) or, where published, `Weights.SAT493M` (satellite images), or their
            names; a local file, a directory of a distributed checkpoint, or a file:// URL, read where it lies: keep it
            in place while the model lives; an https:// URL, downloaded once into torch.hub's cache; or a state dict.
        check_hash: compare the file with the SHA-256 digits at the end of its name.
        **kwargs: of the model: `device`, `drop_path_rate`, `pos_embed_rope_shift_coords`,
            `pos_embed_rope_jitter_coords`, `pos_embed_rope_rescale_coords` (the last four act in training mode alone).
            Of the file: `mmap=False` reads a local file instead of mapping it, `progress=False` hides the bar of a
            download, `hash` and `version` choose another published file.

    Returns:
        A `DinoVisionTransformer` in evaluation mode, its parameters trainable, on the CPU unless `device` is given.

    Raises:
        FileNotFoundError: there is no such local file.
        ValueError: there are no such published weights, or the file is not a checkpoint of this model.
        ConnectionError: the download failed.
        TypeError: an unknown keyword, or one that this model fixes.
    """

Entry = TypeVar("Entry", bound=Callable[..., Any])


def _with_arguments_documented(entry: Entry) -> Entry:
    entry.__doc__ = (entry.__doc__ or "") + _ARGUMENTS
    return entry


@_with_arguments_documented
def dinov3_vits16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-S/16: 21.6 M parameters, 384 channels, 12 blocks."""
    return _make_vit("dinov3_vits16", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_vits16plus(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-S+/16: 28.7 M parameters, 384 channels, 12 blocks, SwiGLU."""
    return _make_vit("dinov3_vits16plus", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_vitb16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-B/16: 85.7 M parameters, 768 channels, 12 blocks."""
    return _make_vit("dinov3_vitb16", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_vitl16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-L/16: 303 M parameters, 1024 channels, 24 blocks; weights LVD1689M and SAT493M."""
    return _make_vit("dinov3_vitl16", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_vitl16plus(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-L+/16: 404 M parameters, 1024 channels, 24 blocks, SwiGLU."""
    return _make_vit("dinov3_vitl16plus", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_vith16plus(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-H+/16: 841 M parameters, 1280 channels, 32 blocks, SwiGLU."""
    return _make_vit("dinov3_vith16plus", pretrained, weights, check_hash, kwargs)


@_with_arguments_documented
def dinov3_vit7b16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-7B/16: 6716 M parameters, 4096 channels, 40 blocks, SwiGLU; weights LVD1689M and SAT493M."""
    return _make_vit("dinov3_vit7b16", pretrained, weights, check_hash, kwargs)


def url_of(entry: str, weights: Weights, *, version: str | None = None, file_hash: str | None = None) -> str:
    """Where published weights are.

    Args:
        entry: name of the hub entry, e.g. `dinov3_vits16`.
        weights: the data that they were trained on, one of those published for this entry.
        version: added to the file name.
        file_hash: first digits of the SHA-256 in the file name; None: those of the published file.
    """
    suffix = f"_{version}" if version else ""
    file_hash = file_hash or PUBLISHED_VITS[entry].hashes[weights.name]
    return f"{BASE_URL}/{entry}/{entry}_pretrain_{weights.name.lower()}{suffix}-{file_hash}.pth"


def _make_vit(
    entry: str, pretrained: bool, weights: WeightsLike, check_hash: bool, kwargs: dict[str, Any]
) -> DinoVisionTransformer:
    _check_keywords(entry, kwargs)
    published = PUBLISHED_VITS[entry]
    data = _published_data(entry, weights)
    model_options = published.options() | {k: v for k, v in kwargs.items() if k in MODEL_OPTIONS}
    device = model_options.pop("device", None)
    if not pretrained:
        if data is None:
            raise ValueError(f"{entry}: weights are given, but pretrained=False reads none; leave out one of the two")
        model = _on_meta(model_options, untied=data.name in published.untied)
        # Built on the meta device, because constructors would initialise everything a first time.
        model.to_empty(device=device or torch.get_default_device())
        model.init_weights()
        return model.eval()
    state, source = _read(entry, data or weights, check_hash, kwargs)
    untied = data.name in published.untied if data else has_untied_cls_norm(state)
    model = _on_meta(model_options, untied=untied)
    load_backbone_(model, state, source=source, target=entry)
    return model.to(device).eval()


def _on_meta(options: dict[str, Any], *, untied: bool) -> DinoVisionTransformer:
    with torch.device("meta"):
        return DinoVisionTransformer(**options | {UNTIED_CLS_NORM: untied})


def _published_data(entry: str, weights: WeightsLike) -> Weights | None:
    if isinstance(weights, str) and weights.upper() in Weights.__members__:
        weights = Weights[weights.upper()]
    if not isinstance(weights, Weights):
        return None
    available = PUBLISHED_VITS[entry].hashes
    if weights.name not in available:
        raise ValueError(f"{entry} was not published with weights {weights.name}, only with {', '.join(available)}")
    return weights


def _read(entry: str, weights: WeightsLike, check_hash: bool, kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    if not isinstance(weights, Weights) and (kwargs.get("hash") or kwargs.get("version")):
        raise ValueError(f"{entry}: hash and version choose among published files, but weights are given")
    if isinstance(weights, Mapping):
        # Copied, because the model takes its tensors over.
        entries = backbone_entries(weights, source="the state dict")
        return {name: tensor.clone() for name, tensor in entries.items()}, "the state dict"
    if isinstance(weights, Weights):
        weights = url_of(entry, weights, version=kwargs.get("version"), file_hash=kwargs.get("hash"))
    if not isinstance(weights, str | os.PathLike):
        raise TypeError(f"{entry}: weights must be a Weights, a path, a URL or a state dict, got {weights!r}")
    path = locate(weights, check_hash=check_hash, progress=kwargs.get("progress", True))
    return read_state_dict(path, mmap=kwargs.get("mmap", True)), str(path)


def _check_keywords(entry: str, kwargs: dict[str, Any]) -> None:
    fixed = PUBLISHED_VITS[entry].options() | {UNTIED_CLS_NORM: "given by the weights"}
    constructor = inspect.signature(DinoVisionTransformer).parameters
    for name in kwargs:
        if name == "version" and kwargs[name] is not None and entry not in VERSIONED:
            raise TypeError(f"{entry}: there is only one version of its weights, got version={kwargs[name]!r}")
        if name in (*FILE_OPTIONS, *MODEL_OPTIONS):
            continue
        if name in constructor:
            raise TypeError(f"{entry} fixes {name} ({fixed.get(name, constructor[name].default)}): leave it out")
        known = ["pretrained", "weights", "check_hash", *FILE_OPTIONS, *MODEL_OPTIONS]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
        raise TypeError(f"{entry} has no keyword argument {name!r}; {hint}")
