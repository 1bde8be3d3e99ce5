"""Weights of a task's head: found among what a file holds, and into the head.

Notable:
- Published files hold a head's entries bare, trainings write `{"model": {...}}`, and state dicts of whole models have
  prefixes: all are taken, and the backbone in them is left out.
- Loading is strict: what is missing, unknown or of another shape is an error that says what the weights are.
- A head that was built on the meta device takes over the tensors as they are mapped: nothing is initialised in vain and
  nothing is copied. The file must stay in place while the head lives; it is never written to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from dinov3.utils.weight_files import WeightsError, read_file

__all__ = ["WeightsError", "head_entries", "load_head_", "read_head"]

Head = TypeVar("Head", bound=nn.Module)

N_LISTED = 5


def read_head(path: str | os.PathLike[str], *, prefix: str = "decoder.", mmap: bool = True) -> dict[str, Any]:
    """The entries of a head in a local file, see `head_entries`.

    Args:
        path: what torch.save or safetensors wrote; `~` is the home directory.
        prefix: of a head's entries in the state dict of a whole model.
        mmap: map the file into memory instead of reading it.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        WeightsError: it is no checkpoint, or damaged.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: there is no such file")
    if path.is_dir():
        raise WeightsError(f"{path} is a directory: expected the file of a head's weights")
    return head_entries(read_file(path, mmap=mmap), prefix)


def head_entries(content: Mapping[str, Any], prefix: str = "decoder.") -> dict[str, Any]:
    """A head's entries under their plain names.

    Args:
        content: a head's state dict or that of a whole model, possibly under the key `model`, with or without
            `module.` before the names.
        prefix: of a head's entries in the state dict of a whole model.
    """
    if isinstance(content.get("model"), Mapping):
        content = content["model"]
    entries = {re.sub(r"^(module\.)+", "", str(name)): value for name, value in content.items()}
    if any(name.startswith(prefix) for name in entries):
        named = re.compile(rf"^{re.escape(prefix)}(module\.)*")
        entries = {named.sub("", name): value for name, value in entries.items() if named.match(name)}
    return entries


def load_head_(head: Head, entries: Mapping[str, Any], *, source: str, target: str) -> Head:
    """Put weights into a head, strictly.

    On the meta device the head takes the tensors over, on the CPU and without a copy; otherwise they go to the head's
    device. Values are converted to the head's dtypes, `requires_grad` stays.

    Args:
        head: changed in place.
        entries: what `read_head` or `head_entries` returned.
        source: where the weights come from, for error messages.
        target: what the head is, for error messages.

    Returns:
        `head`.

    Raises:
        WeightsError: the weights are not those of this head.
    """
    expected = head.state_dict()
    if _forms(entries) != _forms(expected):
        raise WeightsError(_describe_mismatch(entries, expected, source, target))
    head.load_state_dict({name: _like(entries[name], entry) for name, entry in expected.items()}, assign=True)
    return head


def _like(tensor: Tensor, entry: Tensor) -> Tensor:
    device = tensor.device if entry.is_meta else entry.device
    return tensor.detach().to(device=device, dtype=entry.dtype).contiguous()


def _forms(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(e.shape) if isinstance(e, Tensor) else type(e).__name__ for name, e in entries.items()}


def _describe_mismatch(entries: Mapping[str, Any], expected: Mapping[str, Tensor], source: str, target: str) -> str:
    found, wanted = _forms(entries), _forms(expected)
    text = f"{source} does not fit {target}: expected {_name(wanted, ' and ')}, found {_name(found, ', ')}"
    if len(wanted) > N_LISTED:
        missing = [name for name in wanted if name not in found]
        unknown = [name for name in found if name not in wanted]
        other = [f"{name} {found[name]}, not {form}" for name, form in wanted.items() if found.get(name, form) != form]
        kinds = {"missing": missing, "unknown": unknown, "of another form": other}
        text += "".join(f"; {len(names)} {kind} ({_listing(names)})" for kind, names in kinds.items() if names)
    return f"{text}."


def _name(forms: Mapping[str, Any], separator: str) -> str:
    """What kind of weights has such entries, or the first of them."""
    if kind := _kind_of(forms):
        return f"{kind} ({len(forms)} entries)"
    more = f", ... ({len(forms)} entries)" if len(forms) > N_LISTED else ""
    return separator.join(f"{name} {form}" for name, form in list(forms.items())[:N_LISTED]) + more or "nothing"


def _kind_of(forms: Mapping[str, Any]) -> str | None:
    # Entries whose shapes tell the sizes of a head; of another type than a tensor's they tell nothing.
    shapes = {name: form for name, form in forms.items() if isinstance(form, list) and len(form) == 4}
    projects = [shapes[name] for i in range(4) if (name := f"reassemble_blocks.projects.{i}.conv.weight") in shapes]
    fused, last = shapes.get("fusion_blocks.0.project.conv.weight"), shapes.get("conv_depth.head.4.weight")
    if len(projects) == 4 and fused and last:
        widths = ", ".join(str(shape[1]) for shape in projects)
        return f"a DPT head of levels of {widths} channels, {fused[0]} channels within and {last[0]} outputs"
    if linear := shapes.get("conv_depth.weight"):
        return f"a linear depth head of {linear[1]} channels and {linear[0]} outputs"
    if linear := shapes.get("conv.weight"):
        return f"a linear segmentation head of {linear[1]} channels and {linear[0]} classes"
    return "a backbone" if "patch_embed.proj.weight" in shapes or "downsample_layers.0.0.weight" in shapes else None


def _listing(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:N_LISTED]) + (", ..." if len(names) > N_LISTED else "")
