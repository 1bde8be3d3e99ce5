"""Backbone weights: from every form in which this project meets them to a plain state dict, and into a model.

Notable:
- Loading is strict: an entry that is missing, unknown or of another shape is an error that says what the weights are.
- A model that was built on the meta device takes over the tensors of the file as they are mapped: nothing is
  initialised or copied in vain. The file must stay in place while the model lives; it is never written to.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from dinov3.heads.weights import cast_like, list_differences, without_prefix
from dinov3.hub.architectures import has_untied_cls_norm, identify, identify_other_model
from dinov3.hub.formats.conversion import Converted, to_release
from dinov3.hub.formats.reading import is_model_directory, read_content
from dinov3.utils.messages import list_names
from dinov3.utils.weight_files import WeightsError

__all__ = ["WeightsError", "load_backbone_", "read_state_dict"]

logger = logging.getLogger("dinov3")

Model = TypeVar("Model", bound=nn.Module)

#: Where a distributed checkpoint holds the teacher: in training checkpoints, and in exports of only the teacher.
TEACHER_PREFIXES = ("model.teacher.backbone.", "model.model_ema.backbone.", "model.backbone.")
#: Of a training; a backbone's file may hold them beside its entries.
HEADS = ("dino_head.", "ibot_head.")


def read_state_dict(path: str | os.PathLike[str], *, mmap: bool = True) -> dict[str, Tensor]:
    """Read the backbone's entries from a file or a directory, in any of the formats that they come in.

    The formats are: a plain state dict, as published; a training's `{"teacher": {"backbone.*", "dino_head.*", ...}}`,
    of which the heads are left out; the same entries as safetensors; the directories of `dinov3.checkpointer`; and the
    DINOv3 models of Hugging Face transformers and of timm: the directory of a model, or a file of its weights, or the
    index of a sharded one.

    Args:
        path: the file or directory.
        mmap: map the file into memory instead of reading it, where its format allows.

    Returns:
        CPU tensors by their names in the backbone's state dict, converted to them if need be (see `formats`).

    Raises:
        FileNotFoundError: there is nothing at `path`.
        WeightsError: it is not a checkpoint, is damaged, or does not hold a backbone.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: there is no such file or directory")
    if (path / "config.yaml").is_file():
        raise WeightsError(
            f"{path} is the directory of a training run, not of one checkpoint: use dinov3_from_run({str(path)!r})"
        )
    if (path / ".metadata").is_file():
        return _read_distributed(path)
    if path.is_dir() and not is_model_directory(path):
        held = list_names(sorted(file.name for file in path.iterdir()))
        raise WeightsError(
            f"{path} is a directory, but neither a distributed checkpoint (which has a file .metadata) nor a model of "
            f"transformers or timm (which has a config.json or a .safetensors file); it holds {held}"
        )
    content = read_content(path, mmap=mmap)
    return backbone_entries(content.entries, source=str(path), config=content.config, metadata=content.metadata)


def backbone_entries(
    content: Mapping[str, Any],
    *,
    source: str,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Return the backbone's entries of what a file holds, under their plain names.

    Args:
        content: a state dict, possibly under the key `teacher`, with or without the prefixes `module.` and `backbone.`,
            in our layout or that of another library.
        source: where it comes from, for error messages.
        config: of the model, in the words of the other library.
        metadata: of the safetensors file.

    Raises:
        WeightsError: an entry is not a tensor.
    """
    if isinstance(content.get("teacher"), Mapping):
        content = content["teacher"]
    entries = without_prefix(content, "backbone.")
    entries = {name: value for name, value in entries.items() if not name.startswith(HEADS)}
    others = [name for name, value in entries.items() if not isinstance(value, Tensor)]
    if others or not entries:
        problem = f"{len(others)} of its {len(content)} entries are not tensors ({list_names(others)})"
        parts = [
            f"{source} is not a state dict of a backbone: {problem if others else 'it is empty'}.",
            _describe_nested(content),
        ]
        raise WeightsError(" ".join(part for part in parts if part))
    try:
        return to_release(entries, config=config, metadata=metadata)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error


def _describe_nested(content: Mapping[str, Any]) -> str | None:
    for key, value in content.items():
        tensors = {k: v for k, v in value.items() if isinstance(v, Tensor)} if isinstance(value, Mapping) else {}
        if tensors:
            other = identify_other_model(tensors)
            advice = other or "it holds tensors: save only that part and load the new file"
            return f"As for its entry {key!r}, {advice}."
    return None


def load_backbone_(
    model: Model,
    state_or_path: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    source: str | None = None,
    target: str | None = None,
) -> Model:
    """Load weights into a backbone, strictly.

    On the meta device the model takes the tensors over, on the CPU and without a copy; otherwise they go to the model's
    device. Values are converted to the model's dtypes, `requires_grad` stays. Weights without `local_cls_norm` load
    into a model that has one: it becomes a copy of `norm`.

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
    state: Mapping[str, Tensor]
    if isinstance(state_or_path, Mapping):
        state, source = to_release(state_or_path), source or "the state dict"
    else:
        state, source = read_state_dict(state_or_path), source or str(state_or_path)
    expected, origin = model.state_dict(), ""
    if isinstance(state, Converted):
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
    if not has_untied_cls_norm(state):
        # Only local crops in training see this norm: weights without it are complete, and training starts from `norm`.
        copies = {name: name.replace("local_cls_norm.", "norm.") for name in expected if "local_cls_norm." in name}
        state = {**state, **{name: state[norm].clone() for name, norm in copies.items() if norm in state}}
    if differences := list_differences(expected, state):
        details = "; ".join(filter(None, [identify(state), *differences]))
        raise WeightsError(f"{source} does not fit {target or type(model).__name__}: {details}.{origin}")
    _check_initialised(state, source)
    model.load_state_dict({name: cast_like(state[name], entry) for name, entry in expected.items()}, assign=True)
    on_meta = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not on_meta, f"not part of the state dict: {on_meta}"
    return model


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
