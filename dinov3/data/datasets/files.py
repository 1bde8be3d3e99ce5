"""Files of datasets: directories that must exist, NumPy files written once, and data files that stay open."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.utils.files import atomic_write
from dinov3.utils.messages import list_names


def require_directory(root: str | None, dataset: str) -> Path:
    """Return the path of `root`, with `~` expanded.

    Raises:
        ValueError: no root was given.
        FileNotFoundError: it is not a directory.
    """
    if not root:
        raise ValueError(f"{dataset}: give root=DIRECTORY, where the dataset lies")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{dataset}: root={root!r} is not a directory")
    return path


def find_directory(root: Path, names: Sequence[str], dataset: str) -> str:
    """Return the first of `names` that is a directory below `root`.

    Raises:
        FileNotFoundError: none is; the message lists the directories that are there.
    """
    for name in names:
        if (root / name).is_dir():
            return name
    parent = (root / names[0]).parent
    while not parent.is_dir():
        parent = parent.parent
    found = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir())
    raise FileNotFoundError(
        f"{dataset}: there is no directory {root / names[0]}; {parent} has "
        + (f"the directories {list_names(found, 20)}" if found else "no directories")
    )


def save_array(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write `array` to `path` (`.npy`), completely or not at all."""
    with atomic_write(path) as file:
        np.save(file, array)


class ExtraFiles:
    """The NumPy files that a dataset writes once and reads memory-mapped, each when it is first needed.

    A pickled copy maps the files again.

    Args:
        directory: where they lie.
        dataset: name of the dataset's class, for the error.
        dump_string: dataset string for `python -m dinov3.data.datasets.dump`, for the error.
        constructor: Python expression that makes the dataset, for the error.
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
        """Return the array of `<directory>/<name>.npy`, read-only; `check` is called on it the first time.

        Raises:
            FileNotFoundError: the file does not exist; the message says how to write it.
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
        """Write `<directory>/<name>.npy` for each name."""
        self._arrays.clear()  # maps of older files
        for name, array in arrays.items():
            save_array(self.directory / f"{name}.npy", array)


class OpenFiles:
    """Reads parts of many files and keeps those that were read last open; a pickled copy starts with none open.

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
        """Read up to `size` bytes of the file `path` from byte `offset` on; fewer only where the file ends."""
        key = os.fspath(path)
        file = self._open.pop(key, None) or _OpenFile(key)
        self._open[key] = file
        if len(self._open) > self.capacity:
            self._open.popitem(last=False)
        data = b""
        # Positioned reads, because forked processes share what is open. One read returns at most 2 GiB.
        while len(data) < size and (part := file.read(size - len(data), offset + len(data))):
            data += part
        return data


class _OpenFile:
    # Closed when its last reader drops it: another thread may still read a file that falls out of the cache.

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()

    def read(self, size: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self.descriptor, size, offset)
        with self._lock:  # on Windows, which never forks
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            return os.read(self.descriptor, size)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
