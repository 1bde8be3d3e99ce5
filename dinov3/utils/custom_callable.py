"""Loading functions from Python files that are given by path."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def load_custom_callable(module_path: str | Path, callable_name: str) -> Any:
    """Import a Python file and return one of its attributes.

    The file is imported under a unique name, so that it can neither shadow nor replace an installed module of the same
    name. While it is imported, its directory comes first on `sys.path` (see `script_directory_on_path`).

    Args:
        callable_name: the attribute, usually a function.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a Python file.
        AttributeError: the file does not define `callable_name`.
    """
    path = Path(module_path).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no Python file {str(path)!r} to load {callable_name!r} from")
    name = f"_dinov3_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{str(path)!r} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Pickling and dataclasses look the module up by its name.
    with script_directory_on_path(path):
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    if not hasattr(module, callable_name):
        raise AttributeError(f"{str(path)!r} does not define {callable_name!r}")
    return getattr(module, callable_name)


@contextlib.contextmanager
def script_directory_on_path(module_path: str | Path) -> Iterator[None]:
    """Put a script's directory first on `sys.path` inside the context, as if Python had been started with the script.

    A file of a package (with an `__init__.py` beside it) gets the directory that holds the package instead: its own
    would hide installed modules behind files such as `dinov3/eval/setup.py`.
    """
    directory = Path(module_path).expanduser().resolve().parent
    while (directory / "__init__.py").is_file():
        directory = directory.parent
    before = sys.path[:]
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path[:] = before
