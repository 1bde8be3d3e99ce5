"""NumPy files that are never seen half-written, and data files that stay open for the next read."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


def save_array(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write `array` to `path` (`.npy`) under a temporary name and rename it; directories are made as needed."""
    write_atomically(path, lambda file: np.save(file, array))


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file of a temporary name and rename it to `path`; directories are made as needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class ExtraFiles:
    """The NumPy files that a dataset writes once and reads memory-mapped, each when it is first needed.

    Pickles without their content.

    Args:
        directory: where they lie.
        dataset: name of the dataset's class, for the error.
        dump_string: dataset string for `python -m dinov3.data.datasets.dump`.
        constructor: Python expression that makes the dataset.
    """

    def __init__(self, directory: str | os.PathLike[str], *, dataset: str, dump_string: str, constructor: str) -> None:
        self.directory = Path(directory).expanduser()
        self._dataset = dataset
        self._dump_string = dump_string
        self._constructor = constructor
        self._arrays: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": {}}

    def load(self, name: str, check: Callable[[Path, np.ndarray], None] | None = None) -> np.ndarray:
        """The array of `<directory>/<name>.npy`, read-only; `check` sees it the first time.

        Raises:
            FileNotFoundError: the file does not exist; the message has the lines that write it.
        """
        if name not in self._arrays:
            path = self.directory / f"{name}.npy"
            if not path.is_file():
                raise FileNotFoundError(
                    f"{self._dataset}: {path} does not exist. Write the extra files once:\n"
                    f"    python -m dinov3.data.datasets.dump '{self._dump_string}'\n"
                    "or in Python:\n"
                    f"    {self._constructor}.dump_extra()"
                )
            array = np.load(path, mmap_mode="r")
            if check is not None:
                check(path, array)
            self._arrays[name] = array
        return self._arrays[name]

    def save(self, arrays: dict[str, np.ndarray]) -> None:
        """Write `<directory>/<name>.npy` for each name; what was loaded before is forgotten."""
        self._arrays.clear()
        for name, array in arrays.items():
            save_array(self.directory / f"{name}.npy", array)


class OpenFiles:
    """Reads parts of many files, and keeps those that were read last open.

    Reads name their position, so that forked processes may share what is open; a pickled copy starts with nothing open.

    Args:
        capacity: how many files stay open.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"at least one file must stay open, got {capacity}")
        self.capacity = capacity
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "_open": OrderedDict()}

    def __len__(self) -> int:
        return len(self._open)

    def read(self, path: str | os.PathLike[str], offset: int, size: int) -> bytes:
        """Up to `size` bytes of the file `path` from byte `offset` on; fewer only where the file ends."""
        key = os.fspath(path)
        file = self._open.pop(key, None) or _OpenFile(key)
        self._open[key] = file
        if len(self._open) > self.capacity:
            self._open.popitem(last=False)
        return _read_fully(file.descriptor, offset, size)


class _OpenFile:
    # Closed when nobody reads it any more, which another thread may still do when it falls out of the cache.

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _read_fully(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) in (0, size):
        return data
    return data + _read_fully(descriptor, offset + len(data), size - len(data))
