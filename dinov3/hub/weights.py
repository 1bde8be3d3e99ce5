"""Backbone weights: from every form in which this project meets them to a plain state dict, and into a model.

Notable:
- Loading is strict: an entry that is missing, unknown or of another shape is an error that says what the weights are.
- A model that was built on the meta device takes over the tensors as they were read or mapped: nothing is initialised
  or copied in vain. **Never write over a mapped file while the model lives** (see `dinov3.utils.weight_files`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dinov3.heads.weights import cast_like, list_differences
from dinov3.hub.architectures import has_sizes_of, identify, identify_other_model
from dinov3.hub.formats import candidates
from dinov3.hub.formats.conversion import Converted, to_release
from dinov3.hub.formats.reading import is_model_directory, read_content
from dinov3.hub.run_directory import LOOKED_FOR, find_checkpoint
from dinov3.layers import RopePositionEmbedding
from dinov3.utils.memory import keep_freed_memory
from dinov3.utils.messages import list_names
from dinov3.utils.weight_files import WeightsError

__all__ = ["WeightsError", "find_backbones", "load_backbone_", "read_state_dict"]

logger = logging.getLogger("dinov3")

Model = TypeVar("Model", bound=nn.Module)

#: Where a distributed checkpoint holds the teacher: in training checkpoints, and in exports of only the teacher.
TEACHER_PREFIXES = ("model.teacher.backbone.", "model.model_ema.backbone.", "model.backbone.")


def read_state_dict(
    path: str | os.PathLike[str], *, mmap: bool | None = None, like: Callable[[], nn.Module] | None = None
) -> dict[str, Tensor]:
    """Read the backbone's entries from a file or a directory, in any of the formats that they come in.

    The formats are: a state dict as published; a checkpoint of any trainer in which there is one backbone, below any
    keys and prefixes (of a teacher and a student, the teacher); the directories of `dinov3.checkpointer`, or of a
    training run, whose newest teacher is taken; and the DINOv3 models of Hugging Face transformers and of timm: the
    directory of a model, or a file of its weights, or the index of a sharded one.

    Args:
        path: the file or directory.
        mmap: True maps a local file instead of reading it into memory, where its format allows: **then never write
            over it while its tensors are in use.** Default: only if it has more than 4 GiB.
        like: builds the model that the weights are for. If there are several backbones, only those of its size count.

    Returns:
        CPU tensors by their names in the backbone's state dict, converted to them if need be (see `formats`).

    Raises:
        FileNotFoundError: there is nothing at `path`, or a training run that has not saved a teacher.
        WeightsError: it is not a checkpoint, is damaged, or does not hold a backbone, or holds several.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: there is no such file or directory")
    path = find_checkpoint(path)
    if (path / ".metadata").is_file():
        return _read_distributed(path)
    if path.is_dir() and not is_model_directory(path):
        held = list_names(sorted(file.name for file in path.iterdir()))
        raise WeightsError(
            f"{path} is a directory, but neither a distributed checkpoint (which has a file .metadata), nor a training "
            f"run (which has a config.yaml, and some of {LOOKED_FOR}), nor a model of transformers or timm (which has "
            f"a config.json or a .safetensors file); it holds {held}"
        )
    content = read_content(path, mmap=mmap)
    return backbone_entries(
        content.entries, source=str(path), config=content.config, metadata=content.metadata, like=like
    )


def find_backbones(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Read every backbone that a file holds, by the keys and prefixes that lead to it, joined with dots.

    Args:
        path: a file of any trainer.

    Returns:
        The entries of each, in the layout that they have, without heads.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        WeightsError: it is not a checkpoint, or holds an adapter.
    """
    return candidates.find_backbones(read_content(Path(path).expanduser()).entries, source=str(path))


def backbone_entries(
    content: Mapping[str, Any],
    *,
    source: str,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    like: Callable[[], nn.Module] | None = None,
) -> dict[str, Tensor]:
    """Return the entries of the only backbone in what a file holds, under their plain names.

    Args:
        content: a state dict in our layout or that of another library, below any keys and prefixes.
        source: where it comes from, for error messages.
        config: of the model, in the words of the other library.
        metadata: of the safetensors file.
        like: builds the model that the weights are for. If there are several backbones, only those of its size count.

    Raises:
        WeightsError: there is no backbone, or there are several.
    """

    def fits(entries: Mapping[str, Any]) -> bool:
        assert like is not None
        return has_sizes_of(to_release(_tensors(entries)), like())

    entries, others = candidates.select_backbone(content, source=source, fits=fits if like else None)
    if not entries:
        kinds = (identify_other_model(others) or f"it has {list_names(others)}") if others else "it is empty"
        raise WeightsError(
            f"{source} does not hold a DINOv3 backbone: {kinds}; looked for a ViT (cls_token, blocks.0...) and a "
            "ConvNeXt (downsample_layers.0.0...), also in the layouts of transformers and timm, below any prefixes"
        )
    try:
        return to_release(_tensors(entries), config={**others, **(config or {})}, metadata=metadata)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error


def _tensors(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in entries.items() if isinstance(value, Tensor)}


def load_backbone_(
    model: Model,
    state_or_path: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    source: str | None = None,
    target: str | None = None,
) -> Model:
    """Load weights into a backbone, strictly.

    On the meta device the model takes the tensors over, on the CPU and without a copy; otherwise they go to the model's
    device. Values are converted to the model's dtypes, `requires_grad` stays. What weights may lack: `local_cls_norm`
    becomes a copy of `norm`, the mask token is zero, and the periods of positions follow from the model's settings.

    Args:
        model: a backbone, changed in place.
        state_or_path: as returned by `read_state_dict`, or what it takes.
        source: where the weights come from, for error messages. Default: the path.
        target: what the model is, for error messages. Default: its class.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: there is nothing at the path.
        WeightsError: the weights are unreadable or not those of this model.
    """
    keep_freed_memory()  # for the forward passes to come
    state: Mapping[str, Tensor]
    if isinstance(state_or_path, Mapping):
        state, source = to_release(state_or_path), source or "the state dict"
    else:
        state, source = read_state_dict(state_or_path, like=lambda: model), source or str(state_or_path)
    expected, origin = model.state_dict(), ""
    if isinstance(state, Converted) and state.layout is not None:
        origin = f" It came in the layout of {state.layout}; these are the names after conversion."
        eps, given = getattr(getattr(model, "norm", None), "eps", None), state.config.get("layer_norm_eps")
        if given is not None and given != eps:
            logger.warning("%s was made for layer norms with eps=%s, but the model has eps=%s", source, given, eps)
        # Converting could not know whether the model has the masks, nor, from timm, whether it has the biases.
        unknown = {name: tensor for name, tensor in state.items() if name not in expected}
        masks = [name for name in unknown if name.endswith(".qkv.bias_mask")]
        biases = [name for name in unknown if name.endswith(".qkv.bias")]
        if not any(bool(unknown[name].any()) for name in biases):
            state = {name: tensor for name, tensor in state.items() if name not in (*masks, *biases)}
    state = with_optional_entries(state, model, source=source)
    if differences := list_differences(expected, state):
        details = "; ".join(filter(None, [identify(state), *differences]))
        raise WeightsError(f"{source} does not fit {target or type(model).__name__}: {details}.{origin}")
    _check_initialised(state, source)
    model.load_state_dict({name: cast_like(state[name], entry) for name, entry in expected.items()}, assign=True)
    on_meta = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not on_meta, f"not part of the state dict: {on_meta}"
    return model


def with_optional_entries(state: Mapping[str, Tensor], model: nn.Module, *, source: str) -> Mapping[str, Tensor]:
    """Return weights with those entries of a model that they may lack.

    Args:
        state: in our names.
        model: the backbone that they are for.
        source: where the weights come from, for the log.
    """
    expected = model.state_dict()
    # Only local crops in training see `local_cls_norm`: training starts from `norm`. `norms.3` of a ConvNeXt is `norm`.
    norms = {"local_cls_norm.": "norm.", "norms.3.": "norm."}
    copies = {
        name: norm + name.removeprefix(own) for own, norm in norms.items() for name in expected if name.startswith(own)
    }
    added = {name: state[other].clone() for name, other in copies.items() if name not in state and other in state}
    if "cls_token" in state and "mask_token" in expected and "mask_token" not in state:
        added["mask_token"] = torch.zeros_like(state["cls_token"][0])
    rope = getattr(model, "rope_embed", None)
    if isinstance(rope, RopePositionEmbedding) and "cls_token" in state and "rope_embed.periods" not in state:
        added["rope_embed.periods"] = rope.compute_periods("cpu")
    if added:
        logger.info("%s lacks %s: filled in from what is there and the model's settings", source, list_names(added))
    return {**state, **added}


def check_complete(state: Mapping[str, Tensor], model: nn.Module | None, *, source: str) -> None:
    """Refuse a state dict that does not have exactly the entries of a backbone.

    Args:
        state: in our names.
        model: the backbone that its entries show, as returned by `build_from_shapes`; None if they show none.
        source: where the weights come from, for error messages.

    Raises:
        WeightsError: entries are missing, unknown or misshapen, or were saved from a model that was never initialised.
    """
    differences = list_differences(model.state_dict(), state) if model else [f"it has {list_names(state)}"]
    if differences:
        details = "; ".join(filter(None, [identify(state), *differences]))
        raise WeightsError(f"{source} does not hold a complete DINOv3 backbone: {details}.")
    _check_initialised(state, source)


def _read_distributed(path: Path) -> dict[str, Tensor]:
    from dinov3.checkpointer import CheckpointError, read_tensors

    for prefix in TEACHER_PREFIXES:
        try:
            state = read_tensors(path, prefix)
        except CheckpointError as error:
            raise WeightsError(str(error)) from error
        if state:
            return state
    raise WeightsError(f"{path} does not hold a teacher: no entry starts with any of {', '.join(TEACHER_PREFIXES)}")


def _check_initialised(state: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in state.items():
        if name.endswith("bias_mask") and tensor.isnan().any():
            raise WeightsError(
                f"{source} was saved from a model that was never initialised: {name} is NaN, so all features would be"
            )
