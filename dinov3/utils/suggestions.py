"""Naming what a user probably meant."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name nearest to `given`, ignoring case; `""` if none is near."""
    # Compared in lower case, because "imagenet" is nearer to "ImageNet" than difflib thinks.
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(given.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def refuse_unknown_arguments(function: Callable[..., Any], unknown: Mapping[str, Any]) -> None:
    """Raise a TypeError that names the arguments in `unknown`, their nearest known names, and all known ones."""
    if not unknown:
        return
    known = [name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD]
    named = ", ".join(f"{name}={value!r}{did_you_mean(name, known)}" for name, value in unknown.items())
    raise TypeError(f"{function.__name__} does not know {named}; it takes {', '.join(known)}")
