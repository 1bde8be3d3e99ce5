"""Files of features in the formats of safetensors, torch and NumPy, read without running code that they contain."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.utils.files import atomic_write
from dinov3.utils.weight_files import read_file, write_safetensors


def save_features_dict(features_dict: Mapping[str, Tensor | np.ndarray], path: str | os.PathLike[str]) -> None:
    """Write features, and what belongs to them, in the main process.

    Args:
        features_dict: by name, tensors or arrays of any shape, such as `train_features` and `train_labels`.
        path: ends in `.safetensors`, `.pt` (of torch) or `.npy` (a pickled dictionary of arrays, without bfloat16).

    Raises:
        ValueError: the ending is another one, or a value is not a tensor.
    """
    write, _ = _features_format(path)
    tensors = {name: _as_tensor(name, value) for name, value in features_dict.items()}
    if distributed.is_main_process():
        with atomic_write(path) as file:
            write(file, tensors)


def load_features_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what `save_features_dict` wrote. No code in the file is run, not even in pickled ones.

    Args:
        path: ends like those of `save_features_dict`.

    Returns:
        CPU tensors by name. **Files of more than 4 GiB in `.safetensors` and `.pt` are mapped: never write over them
        while the tensors are in use.** `save_features_dict` does not: it writes another file and renames it.

    Raises:
        ValueError: the ending is another one, or the file is damaged or contains something besides tensors or arrays.
    """
    _, read = _features_format(path)
    return {name: _as_tensor(name, value) for name, value in read(Path(path)).items()}


def _features_format(path: str | os.PathLike[str]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if Path(path).suffix not in _FEATURES_FORMATS:
        raise ValueError(f"{os.fspath(path)!r}: the ending must be one of {', '.join(_FEATURES_FORMATS)}")
    return _FEATURES_FORMATS[Path(path).suffix]


def _as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.asarray(value, value.dtype.newbyteorder("="), order="C"))
    if not isinstance(value, Tensor):
        raise ValueError(f"{name!r} is a {type(value).__name__}, expected a tensor or an array of numbers")
    return value.detach().cpu()


def _write_npy(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    np.save(file, np.array({name: tensor.numpy() for name, tensor in tensors.items()}, dtype=object))


def _read_npy(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        _, _, dtype = np.lib.format.read_array_header_1_0(file)
        if not dtype.hasobject:
            raise ValueError(f"{path} holds an array of {dtype}, expected a dictionary of arrays")
        try:
            [content] = _ArraysUnpickler(file).load().data
            return {name: array.to_numpy() for name, array in content.items()}
        except (pickle.UnpicklingError, AttributeError, LookupError, TypeError, ValueError, EOFError) as error:
            raise ValueError(
                f"{path} is damaged, or contains something besides a dictionary of arrays ({error}); Python objects "
                "can run code when they are loaded, so they are refused"
            ) from error


class _ArraysUnpickler(pickle.Unpickler):
    # NumPy's own classes, given forged states, can reach any memory, so everything goes through the classes below.

    def find_class(self, module: str, name: str) -> Any:
        known = {"_reconstruct": _PickledArray, "ndarray": None, "dtype": _PickledDtype}
        if module.partition(".")[0] != "numpy" or name not in known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known[name]


class _PickledDtype:
    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1].replace("|", "=")


class _PickledArray:
    def __init__(self, *_: Any) -> None:
        self.data: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.is_fortran, self.data = state

    def to_numpy(self) -> np.ndarray:
        if not re.fullmatch(r"[biuf][1248]", self.dtype.code):
            raise TypeError(f"an array of {self.dtype.code}")
        dtype = np.dtype(self.dtype.order + self.dtype.code)
        order: Any = "F" if self.is_fortran else "C"
        return np.ndarray(self.shape, dtype, bytearray(self.data), order=order)


_FEATURES_FORMATS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    ".safetensors": (lambda file, tensors: write_safetensors(Path(file.name), tensors, {}), read_file),
    ".pt": (lambda file, tensors: torch.save(tensors, file), read_file),
    ".npy": (_write_npy, _read_npy),
}
