"""Parts of error messages: short lists of names, and what a user probably meant."""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any


def list_names(names: Collection[Any], most: int = 5) -> str:
    """Join names for a message: `"a, b, c"`, or `"a, b, c, d, e and 7 more"`; `"nothing"` if there are none."""
    shown = ", ".join(str(name) for name in itertools.islice(names, most))
    return (shown or "nothing") + (f" and {len(names) - most} more" if len(names) > most else "")


def did_you_mean(given: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Suggest the known name nearest to `given`, ignoring case: `" (did you mean 'x'?)"`, or `""` if none is near.

    Args:
        given: what the user wrote.
        known: the names that exist.
        cutoff: least similarity, from 0 to 1.
    """
    # Compared in lower case, because "imagenet" is nearer to "ImageNet" than difflib thinks.
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(given.lower(), by_lower, n=1, cutoff=cutoff)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def check_choice(option: str, given: str, choices: Collection[str]) -> str:
    """Return `given`, or raise a ValueError that lists the choices and suggests the nearest.

    Args:
        option: what is chosen, as the user calls it.
        given: what the user chose.
        choices: the names that exist.
    """
    if given not in choices:
        raise ValueError(f"{option}={given!r}{did_you_mean(str(given), choices)}: choose one of {', '.join(choices)}")
    return given


def refuse_unknown_arguments(function: Callable[..., Any], unknown: Mapping[str, Any]) -> None:
    """Raise a TypeError that names each unknown argument and the nearest known one, unless `unknown` is empty."""
    if not unknown:
        return
    known = [name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD]
    named = ", ".join(f"{name}={value!r}{did_you_mean(name, known)}" for name, value in unknown.items())
    raise TypeError(f"{function.__name__} does not know {named}; it takes {', '.join(known)}")
