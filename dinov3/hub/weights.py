"""Backbone weights as a plain state dict, from every form in which this project meets them, and into a model.

Notable:
- Loading is strict: an entry that is missing, unknown or of another shape is an error that says what the weights are.
- A model that was built on the meta device takes over the tensors of the file as they are mapped: nothing is
  initialised in vain and nothing is copied. The file must stay in place while the model lives; it is never written to.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from dinov3.hub.architectures import has_untied_cls_norm, identify
from dinov3.hub.files import WeightsError, check_index, read_file

__all__ = ["WeightsError", "load_backbone_", "read_state_dict"]

Model = TypeVar("Model", bound=nn.Module)

#: Where a distributed checkpoint holds the teacher: in training checkpoints, and in an export of the teacher alone.
TEACHER_PREFIXES = ("model.teacher.backbone.", "model.model_ema.backbone.", "model.backbone.")
HEADS = ("dino_head.", "ibot_head.")
N_LISTED = 5


def read_state_dict(path: str | os.PathLike[str], *, mmap: bool = True) -> dict[str, Tensor]:
    """Read the backbone's entries from a file or from a directory of a distributed checkpoint.

    The forms are: a plain state dict, as published; a training's `{"teacher": {"backbone.*", "dino_head.*", ...}}`, of
    which the heads are left out; the same entries as safetensors; and the directories of `dinov3.checkpointer`.

    Args:
        path: the file or directory.
        mmap: map the file into memory instead of reading it, where its format allows.

    Returns:
        CPU tensors by their names in the backbone's state dict.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        WeightsError: it is not a checkpoint, is damaged, or holds no backbone.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: there is no such file or directory")
    if path.is_dir():
        return _read_directory(path)
    return backbone_entries(read_file(path, mmap=mmap), source=str(path))


def backbone_entries(content: Mapping[str, Any], *, source: str) -> dict[str, Tensor]:
    """The backbone's entries of what a file holds, under their plain names.

    Args:
        content: a state dict, possibly under the key `teacher`, with or without the prefixes `module.` and `backbone.`.
        source: where it comes from, for error messages.

    Raises:
        WeightsError: an entry is no tensor.
    """
    if isinstance(content.get("teacher"), Mapping):
        content = content["teacher"]
    entries = {re.sub(r"^(module\.)+", "", str(name)): value for name, value in content.items()}
    if any(name.startswith("backbone.") for name in entries):
        named = re.compile(r"^backbone\.(module\.)*")
        entries = {named.sub("", name): value for name, value in entries.items() if named.match(name)}
    else:
        entries = {name: value for name, value in entries.items() if not name.startswith(HEADS)}
    strangers = [name for name, value in entries.items() if not isinstance(value, Tensor)]
    if strangers or not entries:
        raise WeightsError(
            f"{source} is not a state dict of a backbone: "
            + (f"{_listing(strangers)} of its {len(content)} entries are not tensors" if strangers else "it is empty")
        )
    return entries


def load_backbone_(
    model: Model,
    state_or_path: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    source: str | None = None,
    target: str | None = None,
) -> Model:
    """Put weights into a backbone, strictly.

    On the meta device the model takes the tensors over, on the CPU and without a copy; otherwise they go to the model's
    device. Values are converted to the model's dtypes, `requires_grad` stays. Weights without `local_cls_norm` load
    into a model that has one: it becomes a copy of `norm`.

    Args:
        model: a backbone, changed in place.
        state_or_path: what `read_state_dict` returned, or what it takes.
        source: where the weights come from, for error messages; by default the path.
        target: what the model is, for error messages; by default its class.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: there is nothing at the path.
        WeightsError: the weights are unreadable or not those of this model.
    """
    if isinstance(state_or_path, Mapping):
        state, source = state_or_path, source or "the state dict"
    else:
        state, source = read_state_dict(state_or_path), source or str(state_or_path)
    expected = model.state_dict()
    state = _with_local_cls_norm(expected, state)
    differences = _differences(expected, state)
    if differences:
        parts = [f"{source} does not fit {target or type(model).__name__}: {'; '.join(differences)}.", identify(state)]
        raise WeightsError(" ".join(part for part in parts if part))
    _check_masks(state, source)
    model.load_state_dict({name: _like(state[name], entry) for name, entry in expected.items()}, assign=True)
    on_meta = [name for name, t in itertools.chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
    assert not on_meta, f"not part of the state dict: {on_meta}"
    return model


def _read_directory(path: Path) -> dict[str, Tensor]:
    if (path / "config.yaml").is_file():
        raise WeightsError(
            f"{path} is the directory of a training run, not of one checkpoint: use dinov3_from_run({str(path)!r})"
        )
    if not (path / ".metadata").is_file():
        raise WeightsError(f"{path} is a directory, but not a distributed checkpoint: it has no file .metadata")
    check_index(path / ".metadata")
    from dinov3.checkpointer import CheckpointError, read_tensors

    for prefix in TEACHER_PREFIXES:
        try:
            state = read_tensors(path, prefix)
        except CheckpointError as error:
            raise WeightsError(str(error)) from error
        if state:
            return state
    raise WeightsError(f"{path} holds no teacher: no entry starts with any of {', '.join(TEACHER_PREFIXES)}")


def _with_local_cls_norm(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    # Only the local crops of a training see this norm: weights without it are complete, training starts from `norm`.
    if has_untied_cls_norm(state):
        return state
    wanted = {name: name.replace("local_cls_norm.", "norm.") for name in expected if name.startswith("local_cls_norm.")}
    return {**state, **{name: state[other].clone() for name, other in wanted.items() if other in state}}


def _differences(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    reshaped = [
        f"{name} is {_shape(state[name])}, expected {_shape(entry)}"
        for name, entry in expected.items()
        if name in state and state[name].shape != entry.shape
    ]
    recast = [
        f"{name} is {state[name].dtype}"
        for name, entry in expected.items()
        if name in state and state[name].is_floating_point() != entry.is_floating_point()
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": reshaped, "of another kind": recast}
    return [f"{len(names)} {kind} ({_listing(names)})" for kind, names in kinds.items() if names]


def _check_masks(state: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in state.items():
        if name.endswith("bias_mask") and tensor.isnan().any():
            raise WeightsError(
                f"{source} was saved from a model that was never initialised: {name} is NaN, as all features would be"
            )


def _like(tensor: Tensor, entry: Tensor) -> Tensor:
    device = tensor.device if entry.is_meta else entry.device
    return tensor.detach().to(device=device, dtype=entry.dtype).contiguous()


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"


def _listing(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:N_LISTED]) + (", ..." if len(names) > N_LISTED else "")
