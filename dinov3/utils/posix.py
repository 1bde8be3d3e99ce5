"""Modules of Python that only Linux and macOS have; None on Windows, where models and data do without them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def import_if_present(name: str) -> Any:
    """Import a module of the standard library; return None if this system does not have it."""
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else None


fcntl = import_if_present("fcntl")
resource = import_if_present("resource")
