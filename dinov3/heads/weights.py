"""Weights of a task's head: found among what a file holds, and loaded into the head.

Notable:
- Published files hold a head's entries bare, trainings write `{"model": {...}}`, and state dicts of whole models have
  prefixes: all of them are accepted, and the backbone in them is left out.
- Loading is strict: an entry that is missing, unknown or of another shape is an error that says what the weights are.
- A parameter that a head has under several names may be in the weights under any of them.
- A head that was built on the meta device takes over the tensors as they were read or mapped: nothing is initialised
  or copied in vain. **Never write over a mapped file while the head lives** (see `dinov3.utils.weight_files`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from dinov3.utils.messages import list_names
from dinov3.utils.weight_files import WeightsError, read_file

__all__ = [
    "WeightsError",
    "cast_like",
    "head_entries",
    "list_differences",
    "load_head_",
    "read_head",
    "set_aside",
    "without_prefix",
]

Head = TypeVar("Head", bound=nn.Module)

#: Heads of at most so many entries are described by all of them.
_N_FEW = 5


def read_head(path: str | os.PathLike[str], *, prefix: str = "decoder.", mmap: bool | None = None) -> dict[str, Any]:
    """Read the entries of a head from a local file, see `head_entries`.

    Args:
        path: what torch.save or safetensors wrote; `~` is the home directory.
        prefix: of a head's entries in the state dict of a whole model.
        mmap: True maps the file instead of reading it into memory: **then never write over it while its tensors are
            in use.** Default: only if it has more than 4 GiB.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        WeightsError: it is not a checkpoint, or is damaged.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: there is no such file")
    if path.is_dir():
        raise WeightsError(f"{path} is a directory: expected the file of a head's weights")
    return head_entries(read_file(path, mmap=mmap), prefix)


def head_entries(content: Mapping[str, Any], prefix: str = "decoder.") -> dict[str, Any]:
    """Return a head's entries under their plain names.

    Args:
        content: a head's state dict or that of a whole model, possibly under the key `model`, with or without
            `module.` before the names.
        prefix: of a head's entries in the state dict of a whole model.
    """
    if isinstance(content.get("model"), Mapping):
        content = content["model"]
    return without_prefix(content, prefix)


def without_prefix(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return entries without `module.` and this prefix; if some have it, only those."""
    entries = {re.sub(r"^(module\.)+", "", str(name)): value for name, value in content.items()}
    if any(name.startswith(prefix) for name in entries):
        pattern = re.compile(rf"^{re.escape(prefix)}(module\.)*")
        entries = {pattern.sub("", name): value for name, value in entries.items() if pattern.match(name)}
    return entries


def load_head_(head: Head, entries: Mapping[str, Any], *, source: str, target: str) -> Head:
    """Load weights into a head, strictly.

    On the meta device the head takes the tensors over, on the CPU and without a copy; otherwise they go to the head's
    device. Values are converted to the head's dtypes, `requires_grad` stays.

    Args:
        head: changed in place.
        entries: as returned by `read_head` or `head_entries`.
        source: where the weights come from, for error messages.
        target: what the head is, for error messages.

    Returns:
        `head`.

    Raises:
        WeightsError: the weights are not those of this head.
    """
    expected = head.state_dict()
    entries = complete_tied(head, entries)
    differences = list_differences(expected, entries)
    if differences:
        message = f"{source} does not fit {target}: expected {_describe(expected)}, found {_describe(entries)}"
        details = differences if len(expected) > _N_FEW else []
        raise WeightsError("; ".join([message, *details]) + ".")
    head.load_state_dict({name: cast_like(entries[name], entry) for name, entry in expected.items()}, assign=True)
    return head


def complete_tied(head: nn.Module, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Add the entries of parameters that a head has under several names, if the weights have one of the names."""
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, parameter in head.named_parameters(remove_duplicate=False):
        names_of[id(parameter)].append(name)
    completed = dict(entries)
    for names in names_of.values():
        if present := [name for name in names if name in entries]:
            completed |= {name: entries[present[0]] for name in names if name not in entries}
    return completed


@contextlib.contextmanager
def set_aside(head: nn.Module, backbone: nn.Module) -> Iterator[str | None]:
    """Take a backbone out of a head that contains it, so that its entries are not among those of the head.

    Yields:
        The prefix that its entries have in the head's state dict, or None if the head does not contain it.
    """
    name = next((name for name, module in head.named_modules() if module is backbone), None)
    if not name:
        yield None
        return
    owner, _, attribute = name.rpartition(".")
    setattr(head.get_submodule(owner), attribute, None)
    try:
        yield f"{name}."
    finally:
        setattr(head.get_submodule(owner), attribute, backbone)


def list_differences(expected: Mapping[str, Tensor], entries: Mapping[str, Any]) -> list[str]:
    """Say which entries are missing, unknown, or of another shape or type, each in one phrase; nothing if all fit."""
    common = {name: (entries[name], entry) for name, entry in expected.items() if name in entries}
    kinds = {
        "missing": [name for name in expected if name not in entries],
        "unknown": [name for name in entries if name not in expected],
        "of another shape": [
            f"{name} is {list(found.shape)}, expected {list(entry.shape)}"
            for name, (found, entry) in common.items()
            if isinstance(found, Tensor) and found.shape != entry.shape
        ],
        "of another type": [
            f"{name} is {found.dtype if isinstance(found, Tensor) else type(found).__name__}"
            for name, (found, entry) in common.items()
            if not isinstance(found, Tensor) or (entry.is_floating_point() and not found.is_floating_point())
        ],
    }
    return [f"{len(names)} {kind} ({list_names(names)})" for kind, names in kinds.items() if names]


def cast_like(tensor: Tensor, entry: Tensor) -> Tensor:
    """Convert weights to the dtype and device of the entry they are for; one on the meta device lets them stay."""
    device = tensor.device if entry.is_meta else entry.device
    return tensor.detach().to(device=device, dtype=entry.dtype).contiguous()


def _describe(entries: Mapping[str, Any]) -> str:
    shapes = {name: list(entry.shape) for name, entry in entries.items() if isinstance(entry, Tensor)}
    if (
        kind := _query_head(shapes)
        or _detector(shapes)
        or _kind_of({name: shape for name, shape in shapes.items() if len(shape) == 4})
    ):
        return f"{kind} ({len(entries)} entries)"
    return list_names([f"{name} {shapes.get(name, type(entry).__name__)}" for name, entry in entries.items()], _N_FEW)


def _query_head(shapes: dict[str, list[int]]) -> str | None:
    # Whatever stands before the names: the head may be part of a larger one, with the adapter.
    masks, classes = (
        next((shape for name, shape in shapes.items() if name.endswith(end)), None)
        for end in ("pixel_decoder.mask_feature.weight", "predictor.class_embed.weight")
    )
    if not masks or not classes:
        return None
    return f"a Mask2Former head of width {masks[1]} and {classes[0] - 1} classes"


def _detector(shapes: dict[str, list[int]]) -> str | None:
    projection = next((shape for name, shape in shapes.items() if name.endswith("input_proj.0.0.weight")), None)
    classes = next((shape for name, shape in shapes.items() if name.endswith("class_embed.0.weight")), None)
    if not projection or not classes:
        return None
    return f"a Plain-DETR head of {projection[1]} input channels, width {projection[0]} and {classes[0]} classes"


def _kind_of(kernels: Mapping[str, list[int]]) -> str | None:
    # The shapes of convolutions show the sizes of a head.
    projects = [kernels[name] for i in range(4) if (name := f"reassemble_blocks.projects.{i}.conv.weight") in kernels]
    fused, last = kernels.get("fusion_blocks.0.project.conv.weight"), kernels.get("conv_depth.head.4.weight")
    if len(projects) == 4 and fused and last:
        widths = ", ".join(str(shape[1]) for shape in projects)
        return f"a DPT head with levels of {widths} channels, {fused[0]} channels inside and {last[0]} outputs"
    if linear := kernels.get("conv_depth.weight"):
        return f"a linear depth head with {linear[1]} channels and {linear[0]} outputs"
    if linear := kernels.get("conv.weight"):
        return f"a linear segmentation head with {linear[1]} channels and {linear[0]} classes"
    return "a backbone" if "patch_embed.proj.weight" in kernels or "downsample_layers.0.0.weight" in kernels else None
