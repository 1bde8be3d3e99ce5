"""The published backbones by name, for `torch.hub` and for Python.

Notable:
- Models come back in evaluation mode, with all parameters trainable. In training mode their positions are rescaled at
  random, so that two forwards of one image differ.
- The entries of the weights show which norms the model has, so files may have any name.
- With `dtype=torch.bfloat16` the tensors of a bfloat16 file are used as they are; the positions are computed in float32
  all the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor

from dinov3.hub.architectures import PUBLISHED, UNTIED_CLS_NORM, PublishedViT, has_untied_cls_norm
from dinov3.hub.sources import (
    BASE_URL,
    Source,
    check_file_hash,
    choose_weights,
    convert_path_or_url_to_url,
    is_url,
    read_weights,
)
from dinov3.hub.weights import backbone_entries, load_backbone_, read_state_dict
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer
from dinov3.utils.dtype import as_torch_dtype
from dinov3.utils.memory import keep_freed_memory
from dinov3.utils.messages import did_you_mean
from dinov3.utils.tensors import default_device

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


WeightsLike = Weights | Source

#: Entries with several published versions of their weights.
VERSIONED = ("dinov3_vitl16plus", "dinov3_vith16plus")
#: Options of the models that change neither their weights nor, but for `patch_size`, what they compute in evaluation.
MODEL_OPTIONS: dict[type, tuple[str, ...]] = {
    DinoVisionTransformer: (
        "drop_path_rate",
        "pos_embed_rope_shift_coords",
        "pos_embed_rope_jitter_coords",
        "pos_embed_rope_rescale_coords",
    ),
    ConvNeXt: ("drop_path_rate", "patch_size"),
}

_ARGUMENTS = """{summary}

    Args:
        pretrained: load `weights`; if False, initialise at random and read nothing.
        weights: {weights}, or its name.
            Or a local path or file:// URL, read where it lies. Its content, not its name, decides how it is read: a
            file in the published layout (.pth or .safetensors), or a checkpoint of any trainer that holds one backbone
            of this size, below any keys and prefixes; a training run or a directory in it, for its newest teacher; a
            DINOv3 model of Hugging Face transformers or of timm, as the directory of the model, a file of its weights
            or the index of several.
            Or an https:// URL, downloaded once into torch.hub's cache. Or a state dict in any of these layouts.
        check_hash: compare the file with the SHA-256 digits at the end of its name.
        **kwargs: `device`; `dtype`, floating point or its name, of all parameters (by default float32): images must
            have it too, or the call be under autocast.
            Of the model: {options}.
            Of the file: `mmap=True` maps it instead of reading it into memory, which by default is only done if it has
            more than 4 GiB (`mmap=False`: never). **While a model is mapped, never write over its file: that changes
            the model or kills the process. Write to another name and rename it.** `progress=False` hides the bar of
            a download, `hash` and `version` select another published file.

    Returns:
        A `{model}` in evaluation mode, its parameters trainable, on the CPU unless `device` is given.

    Raises:
        FileNotFoundError: there is no such local file.
        ValueError: such weights were not published, or the file is not a checkpoint of this model.
        ConnectionError: the download failed.
        TypeError: an unknown keyword, or one that this model fixes.
    """

Entry = TypeVar("Entry", bound=Callable[..., Any])
Backbone = TypeVar("Backbone", DinoVisionTransformer, ConvNeXt)


def _document_arguments(entry: Entry) -> Entry:
    if isinstance(PUBLISHED[entry.__name__], PublishedViT):
        model = "DinoVisionTransformer"
        weights = "`Weights.LVD1689M` (web images) or, where published, `Weights.SAT493M` (satellite images)"
        options = """`drop_path_rate`, `pos_embed_rope_shift_coords`, `pos_embed_rope_jitter_coords`,
            `pos_embed_rope_rescale_coords`, which only act in training mode"""
    else:
        model, weights = "ConvNeXt", "`Weights.LVD1689M` (web images)"
        options = """`patch_size`, to which `get_intermediate_layers` resizes its maps; `drop_path_rate`, which
            only acts in training mode"""
    entry.__doc__ = _ARGUMENTS.format(summary=entry.__doc__, model=model, weights=weights, options=options)
    return entry


@_document_arguments
def dinov3_vits16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-S/16: 21.6 M parameters, 384 channels, 12 blocks."""
    return _make(DinoVisionTransformer, "dinov3_vits16", pretrained, weights, check_hash, kwargs)


@_document_arguments
def dinov3_vits16plus(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-S+/16: 28.7 M parameters, 384 channels, 12 blocks, SwiGLU."""
    return _make(DinoVisionTransformer, "dinov3_vits16plus", pretrained, weights, check_hash, kwargs)


@_document_arguments
def dinov3_vitb16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-B/16: 85.7 M parameters, 768 channels, 12 blocks."""
    return _make(DinoVisionTransformer, "dinov3_vitb16", pretrained, weights, check_hash, kwargs)


@_document_arguments
def dinov3_vitl16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-L/16: 303 M parameters, 1024 channels, 24 blocks; weights LVD1689M and SAT493M."""
    return _make(DinoVisionTransformer, "dinov3_vitl16", pretrained, weights, check_hash, kwargs)


@_document_arguments
def dinov3_vitl16plus(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-L+/16: 404 M parameters, 1024 channels, 24 blocks, SwiGLU."""
    return _make(DinoVisionTransformer, "dinov3_vitl16plus", pretrained, weights, check_hash, kwargs)


@_document_arguments
def dinov3_vith16plus(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-H+/16: 841 M parameters, 1280 channels, 32 blocks, SwiGLU."""
    return _make(DinoVisionTransformer, "dinov3_vith16plus", pretrained, weights, check_hash, kwargs)


@_document_arguments
def dinov3_vit7b16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """DINOv3 ViT-7B/16: 6716 M parameters, 4096 channels, 40 blocks, SwiGLU; weights LVD1689M and SAT493M."""
    return _make(DinoVisionTransformer, "dinov3_vit7b16", pretrained, weights, check_hash, kwargs)


@_document_arguments
def dinov3_convnext_tiny(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> ConvNeXt:
    """DINOv3 ConvNeXt-T: 27.8 M parameters, 768 channels, 18 blocks, stride 32."""
    return _make(ConvNeXt, "dinov3_convnext_tiny", pretrained, weights, check_hash, kwargs)


@_document_arguments
def dinov3_convnext_small(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> ConvNeXt:
    """DINOv3 ConvNeXt-S: 49.5 M parameters, 768 channels, 36 blocks, stride 32."""
    return _make(ConvNeXt, "dinov3_convnext_small", pretrained, weights, check_hash, kwargs)


@_document_arguments
def dinov3_convnext_base(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> ConvNeXt:
    """DINOv3 ConvNeXt-B: 87.6 M parameters, 1024 channels, 36 blocks, stride 32."""
    return _make(ConvNeXt, "dinov3_convnext_base", pretrained, weights, check_hash, kwargs)


@_document_arguments
def dinov3_convnext_large(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> ConvNeXt:
    """DINOv3 ConvNeXt-L: 196 M parameters, 1536 channels, 36 blocks, stride 32."""
    return _make(ConvNeXt, "dinov3_convnext_large", pretrained, weights, check_hash, kwargs)


def url_of(entry: str, weights: Weights, *, version: str | None = None, file_hash: str | None = None) -> str:
    """Return the address of published weights.

    Args:
        entry: name of the hub entry, e.g. `dinov3_vits16`.
        weights: the data that they were trained on, one of those published for this entry.
        version: added to the file name.
        file_hash: first digits of the SHA-256 in the file name. Default: those of the published file.
    """
    suffix = f"_{version}" if version else ""
    hashes = PUBLISHED[entry].hashes
    file_hash = check_file_hash(file_hash, hashes.values()) if file_hash else hashes[weights.name]
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
    published = PUBLISHED[entry]
    selectors = {name: kwargs.get(name) for name in ("hash", "version")}
    available = [Weights[name] for name in published.hashes]
    source = choose_weights(entry, weights, available, pretrained=pretrained, selectors=selectors)
    dtype = _floating_dtype(entry, kwargs.get("dtype"))
    options = published.options() | {k: v for k, v in kwargs.items() if k in MODEL_OPTIONS[model_class]}
    state: dict[str, Tensor] | None = None

    def structure() -> Backbone:
        with torch.device("meta"):
            return model_class(**options)

    if pretrained:
        if isinstance(source, Mapping):
            state, name = backbone_entries(source, source="the state dict", like=structure), "the state dict"
            for key, tensor in state.items():
                state[key] = tensor.clone()  # Because the model takes its tensors over.
        else:
            version, file_hash = selectors["version"], selectors["hash"]
            file = (
                url_of(entry, source, version=version, file_hash=file_hash) if isinstance(source, Weights) else source
            )
            mmap, progress = kwargs.get("mmap"), kwargs.get("progress", True)
            state, name = read_weights(
                file,
                lambda path: read_state_dict(path, mmap=mmap, like=structure),
                check_hash=check_hash,
                progress=progress,
            )
    if isinstance(published, PublishedViT):
        # The data decide which norms there are; of other weights their entries do.
        untied = source.name in published.untied if isinstance(source, Weights) else has_untied_cls_norm(state or {})
        options[UNTIED_CLS_NORM] = untied
    # Built on the meta device, because constructors would initialise what is overwritten.
    model = structure()
    device = torch.device(kwargs.get("device") or default_device())
    if state is not None:
        return load_backbone_(_cast(model, dtype), state, source=name, target=entry).to(kwargs.get("device")).eval()
    if device.type != "meta":
        keep_freed_memory()  # for the forward passes to come, as loading does
        model.to_empty(device=device)
        model.init_weights()
    return _cast(model, dtype).eval()  # Cast last: random numbers of few bits have another distribution.


def _cast(model: Backbone, dtype: torch.dtype | None) -> Backbone:
    if dtype is None:
        return model
    if isinstance(model, ConvNeXt):
        return model.to(dtype)
    # Positions are computed in float32 whatever the dtype of the parameters, as after training in low precision.
    periods = model.rope_embed.periods
    model.to(dtype)
    model.rope_embed.periods = periods
    return model


def _floating_dtype(entry: str, dtype: Any) -> torch.dtype | None:
    try:
        found = None if dtype is None else as_torch_dtype(dtype)
    except KeyError:
        found = torch.bool
    if found not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{entry}: dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    return found


def _check_keywords(model_class: type[DinoVisionTransformer | ConvNeXt], entry: str, kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("version") is not None and entry not in VERSIONED:
        raise TypeError(f"{entry}: its weights have only one version, got version={kwargs['version']!r}")
    optional = ("device", "dtype", *MODEL_OPTIONS[model_class], "hash", "version", "mmap", "progress")
    constructor = inspect.signature(model_class).parameters
    for name in kwargs:
        if name in optional:
            continue
        if name in constructor and constructor[name].kind is not inspect.Parameter.VAR_KEYWORD:
            fixed = PUBLISHED[entry].options() | {UNTIED_CLS_NORM: "determined by the weights"}
            raise TypeError(f"{entry} fixes {name} ({fixed.get(name, constructor[name].default)}): leave it out")
        known = ["pretrained", "weights", "check_hash", *optional]
        hint = did_you_mean(name, known) or f"; it takes {', '.join(known)}"
        raise TypeError(f"{entry} has no keyword argument {name!r}{hint}")
