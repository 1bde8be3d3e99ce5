"""Backbone weights as a plain state dict, from every form in which this project meets them, and into a model.

Notable:
- Loading is strict: an entry that is missing, unknown or of another shape is an error that says what the weights are.
- A model that was built on the meta device takes over the tensors of the file as they are mapped: nothing is
  initialised in vain and nothing is copied. The file must stay in place while the model lives; it is never written to.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from dinov3.hub.architectures import has_untied_cls_norm, identify
from dinov3.hub.formats import Converted, Layout, is_model_directory, read_content, to_release
from dinov3.utils.weight_files import WeightsError

__all__ = ["WeightsError", "load_backbone_", "read_state_dict"]

logger = logging.getLogger("dinov3")

Model = TypeVar("Model", bound=nn.Module)

#: Where a distributed checkpoint holds the teacher: in training checkpoints, and in an export of the teacher alone.
TEACHER_PREFIXES = ("model.teacher.backbone.", "model.model_ema.backbone.", "model.backbone.")
HEADS = ("dino_head.", "ibot_head.")
N_LISTED = 5


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
        WeightsError: it is not a checkpoint, is damaged, or holds no backbone.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: there is no such file or directory")
    if path.is_dir():
        return _read_directory(path, mmap=mmap)
    content = read_content(path, mmap=mmap)
    return backbone_entries(content.entries, source=str(path), config=content.config, metadata=content.metadata)


def backbone_entries(
    content: Mapping[str, Any],
    *,
    source: str,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The backbone's entries of what a file holds, under their plain names.

    Args:
        content: a state dict, possibly under the key `teacher`, with or without the prefixes `module.` and `backbone.`,
            in our layout or that of another library.
        source: where it comes from, for error messages.
        config: of the model, in the words of the other library.
        metadata: of the safetensors file.

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
        problem = f"{_listing(strangers)} of its {len(content)} entries are not tensors" if strangers else "it is empty"
        hint = _hint_of_nested(content)
        raise WeightsError(f"{source} is not a state dict of a backbone: {problem}" + (f". {hint}" if hint else ""))
    try:
        return to_release(entries, config=config, metadata=metadata)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error


def _hint_of_nested(content: Mapping[str, Any]) -> str | None:
    for key, value in content.items():
        tensors = {k: v for k, v in value.items() if isinstance(v, Tensor)} if isinstance(value, Mapping) else {}
        if tensors:
            what = identify(tensors) or f"{len(tensors)} tensors are below {key!r}: save that part alone and load it."
            return f"Below {key!r}: {what}" if what.startswith("It") else what
    return None


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
    state: Mapping[str, Tensor]
    if isinstance(state_or_path, Mapping):
        state, source = to_release(state_or_path), source or "the state dict"
    else:
        state, source = read_state_dict(state_or_path), source or str(state_or_path)
    layout = state.layout if isinstance(state, Converted) else None
    if isinstance(state, Converted):
        _warn_of_other_norms(model, state, source)
    expected = model.state_dict()
    state = _without_needless_bias(expected, _with_local_cls_norm(expected, state), layout)
    differences = _differences(expected, state)
    if differences:
        parts = [
            f"{source} does not fit {target or type(model).__name__}: {'; '.join(differences)}.",
            f"It came in the layout of {layout}; these are the names after conversion." if layout else None,
            identify(state),
        ]
        raise WeightsError(" ".join(part for part in parts if part))
    _check_masks(state, source)
    model.load_state_dict({name: _like(state[name], entry) for name, entry in expected.items()}, assign=True)
    on_meta = [name for name, t in itertools.chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
    assert not on_meta, f"not part of the state dict: {on_meta}"
    return model


def check_complete(state: Mapping[str, Tensor], model: nn.Module | None, *, source: str) -> None:
    """Refuse a state dict that has not exactly the entries of a backbone.

    Args:
        state: in our names.
        model: what it looks like, see `build_like`; None: nothing at all.
        source: where the weights come from, for error messages.

    Raises:
        WeightsError: it has not, or was saved from a model that was never initialised.
    """
    differences = _differences(model.state_dict(), state) if model else [f"it has {_listing(state)}"]
    if differences:
        parts = [f"{source} does not hold a complete DINOv3 backbone: {'; '.join(differences)}.", identify(state)]
        raise WeightsError(" ".join(part for part in parts if part))
    _check_masks(state, source)


def _read_directory(path: Path, *, mmap: bool) -> dict[str, Tensor]:
    if (path / "config.yaml").is_file():
        raise WeightsError(
            f"{path} is the directory of a training run, not of one checkpoint: use dinov3_from_run({str(path)!r})"
        )
    if not (path / ".metadata").is_file():
        if is_model_directory(path):
            content = read_content(path, mmap=mmap)
            return backbone_entries(content.entries, source=str(path), config=content.config, metadata=content.metadata)
        held = ", ".join(sorted(p.name for p in path.iterdir())[:N_LISTED]) or "nothing"
        raise WeightsError(
            f"{path} is a directory, but neither a distributed checkpoint (it has no file .metadata) nor a model of "
            f"transformers or timm (no config.json, no .safetensors file); it holds {held}"
        )
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


def _warn_of_other_norms(model: nn.Module, state: Converted, source: str) -> None:
    eps, given = getattr(getattr(model, "norm", None), "eps", None), state.config.get("layer_norm_eps")
    if given is not None and given != eps:
        logger.warning("%s was made for layer norms with eps=%s, but the model has eps=%s", source, given, eps)


def _without_needless_bias(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], layout: Layout | None
) -> Mapping[str, Tensor]:
    # Converting could not know whether the model has the masks, nor, from timm, whether it has the biases.
    if layout is None:
        return state
    masks = [name for name in state if name.endswith(".qkv.bias_mask") and name not in expected]
    biases = [name for name in state if name.endswith(".qkv.bias") and name not in expected]
    if any(bool(state[name].any()) for name in biases):
        return state
    return {name: tensor for name, tensor in state.items() if name not in (*masks, *biases)}


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
