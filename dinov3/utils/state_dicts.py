"""What checkpoints of any trainer hold: nested mappings and prefixed names, as one name for each entry."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dinov3.utils.weight_files import WeightsError

#: Parts of names that wrappers add: data parallelism and DeepSpeed, torch.compile, FSDP, activation checkpointing; and
#: where a module that was saved as a whole keeps its parts.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_modules|_parameters|_buffers)\."
)


def flatten(content: Mapping[Any, Any], *, source: str) -> dict[str, Any]:
    """Return the entries of nested mappings by their names joined with dots, without what wrappers add to names.

    Args:
        content: what a file holds.
        source: where it comes from, for error messages.

    Raises:
        WeightsError: two entries only differ in what wrappers add to their names.
    """
    flat: dict[str, Any] = {}
    for given, value in _leaves(content, "", ()):
        name = _WRAPPERS.sub("", given)
        if name in flat and flat[name] is not value:
            raise WeightsError(f"{source} holds {name} twice, once as {given}: save only one of them")
        flat[name] = value
    return flat


def _leaves(content: Mapping[Any, Any], prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    # An object that is not loaded (see `weight_files`) has its attributes in `vars`.
    attributes = {key: value for key, value in getattr(content, "__dict__", {}).items() if key != "_metadata"}
    for key, value in {**content, **attributes}.items():
        if not isinstance(value, Mapping):
            yield f"{prefix}{key}", value
        elif id(value) not in above:  # Objects may refer to what holds them.
            yield from _leaves(value, f"{prefix}{key}.", (*above, id(value)))


def find_prefixes(names: Collection[str], mark: str) -> list[str]:
    """Return what stands before `mark` in each name that ends with it: nothing, or a prefix that ends with a dot."""
    return [name.removesuffix(mark) for name in names if name == mark or name.endswith(f".{mark}")]


def choose_prefix(prefixes: Collection[str], *, source: str, what: str, advice: str) -> str:
    """Return the only prefix, or of several the only one of a teacher.

    Args:
        prefixes: at least one.
        source: where they come from, for error messages.
        what: lies below each of them, in the plural.
        advice: what the user can do.

    Raises:
        WeightsError: there are several.
    """
    of_teachers = [prefix for prefix in prefixes if prefix.startswith("teacher.")]
    found = of_teachers if len(prefixes) > 1 and len(of_teachers) == 1 else list(prefixes)
    if len(found) > 1:
        listed = " and ".join(repr(prefix.removesuffix(".")) for prefix in found)
        raise WeightsError(f"{source} holds {len(found)} {what}, {listed}: {advice}")
    return found[0]
