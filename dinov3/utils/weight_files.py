"""Reading weights files, recognised by their content and not by their name, without running code; writing safetensors.

Files of up to 4 GiB are read into memory; afterwards they may be changed or deleted. Larger PyTorch checkpoints in zip
form and safetensors are memory-mapped: a tensor is read from the disk when it is first used; writing to it changes a
private copy. **While tensors of a mapped file are in use, never write over the file: that changes them, or kills the
process with a bus error. Write to another name and rename it**, as `atomic_write` does; the mapping keeps the old file.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dinov3.utils.files import atomic_write

logger = logging.getLogger("dinov3")

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

#: Larger files are mapped unless the caller decides, in bytes: reading them takes long, and may take all memory.
MAPPED_ABOVE = 4 * 2**30

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"
_MAGIC = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"RIFF": "a WebP picture or another RIFF file",
    b"%PDF": "a PDF document",
    b"\x1f\x8b": "a gzip archive (unpack it first)",
}


class WeightsError(ValueError):
    """A file or state dict that cannot be used as the weights that were asked for."""


def read_file(path: Path, *, mmap: bool | None = None) -> Mapping[str, Any]:
    """Read a PyTorch checkpoint or a safetensors file.

    Args:
        path: an existing file.
        mmap: map the file instead of reading it into memory, which only zip-format checkpoints and safetensors allow:
            **then never write over it while its tensors are in use.** Default: only if it has more than 4 GiB.

    Returns:
        The mapping that the file holds; its tensors are on the CPU.

    Raises:
        WeightsError: the file is empty, truncated or not a checkpoint, or holds more than plain data.
    """
    mmap = should_map(path) if mmap is None else mmap
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise WeightsError(f"{path} is empty (0 bytes): the download or the copy failed, fetch the file again")
    if _is_safetensors(head):
        return _read_safetensors(path, mmap=mmap)
    if not head.startswith((_ZIP_MAGIC, _PICKLE_MAGIC)):
        raise WeightsError(f"{path} is not a checkpoint: {_describe(head)}")
    if head.startswith(_ZIP_MAGIC) and not zipfile.is_zipfile(path):
        raise WeightsError(
            f"{path} is truncated: a zip archive of {path.stat().st_size} bytes without its end; fetch the file again"
        )
    content = _read_pickle(path, mmap=mmap and head.startswith(_ZIP_MAGIC))
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, expected a state dict")
    return content


def should_map(*paths: Path) -> bool:
    """Return whether files that are used together are too large to be read into memory unasked."""
    return sum(path.stat().st_size for path in paths) > MAPPED_ABOVE


@dataclass(frozen=True)
class SafetensorsEntry:
    """What the header of a safetensors file says about one tensor.

    Attributes:
        begin: its first byte, counted from the end of the header.
        end: the byte after its last.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file.

    Attributes:
        entries: the tensors by name.
        metadata: texts by name, which the format stores beside the tensors.
        start: the byte of the file where the tensors begin.
    """

    entries: dict[str, SafetensorsEntry]
    metadata: dict[str, str]
    start: int


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins like a safetensors file."""
    with path.open("rb") as file:
        return _is_safetensors(file.read(9))


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read what a safetensors file holds, without its tensors, and check that it is consistent.

    Raises:
        WeightsError: the header is damaged, contradicts itself, or does not match the size of the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, size))
    if 8 + length > size:
        raise WeightsError(
            f"{path} is a truncated safetensors file: its header should have {length} bytes, but the whole file has "
            f"{size}; fetch the file again"
        )
    try:
        content = json.loads(text)
        metadata = {str(key): str(value) for key, value in content.pop("__metadata__", {}).items()}
        entries = {name: _parse_entry(path, name, entry) for name, entry in content.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} is a damaged safetensors file: its header cannot be read ({error})") from error
    _check_places(path, entries, size - 8 - length)
    return SafetensorsHeader(entries, metadata, start=8 + length)


def make_safetensors_header(
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """Return what a safetensors file begins with; the bytes of the tensors follow, in the order of `layout`.

    Args:
        layout: dtype and shape of each tensor by name.
        metadata: texts by name.
    """
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    reached = 0
    for name, (dtype, shape) in layout.items():
        place = [reached, reached + math.prod(shape) * dtype.itemsize]
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": place}
        reached = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    on_written: Callable[[int], Any] = lambda n_bytes: None,
) -> None:
    """Write a safetensors file, completely or not at all, and tensor by tensor, so that mapped ones need no memory.

    Args:
        path: the file, which is replaced if it exists.
        tensors: on the CPU.
        metadata: texts by name.
        on_written: called with the number of bytes after each tensor.
    """
    # Wide types first, so that every tensor is aligned in the mapped file.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header = make_safetensors_header({name: (tensor.dtype, tensor.shape) for name, tensor in ordered}, metadata)
    with atomic_write(path) as file:
        file.write(header)
        for _, tensor in ordered:
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            on_written(tensor.nbytes)


def _parse_entry(path: Path, name: str, entry: Any) -> SafetensorsEntry:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        is_plausible = isinstance(code, str) and all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        )
    except (KeyError, TypeError, ValueError):
        is_plausible = False
    if not is_plausible:
        raise WeightsError(
            f"{path} has a damaged safetensors header: {name!r} needs a dtype, a shape and its first and last byte, "
            f"but has {str(entry)[:100]}"
        )
    if code not in SAFETENSORS_DTYPES:
        raise WeightsError(
            f"{path} holds values of an unknown type: {name!r} is {code}, "
            f"expected one of {', '.join(SAFETENSORS_DTYPES)}"
        )
    dtype = SAFETENSORS_DTYPES[code]
    needed = math.prod(shape) * dtype.itemsize
    if needed != end - begin:
        raise WeightsError(
            f"{path} has a damaged safetensors header: {name!r} is {code} of shape {list(shape)}, which takes {needed} "
            f"bytes, but its place ({begin} to {end}) has {end - begin}; fetch the file again"
        )
    return SafetensorsEntry(dtype, shape, begin, end)


def _check_places(path: Path, entries: dict[str, SafetensorsEntry], size: int) -> None:
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached:
            raise WeightsError(
                f"{path} has a damaged safetensors header: {name!r} begins at byte {entry.begin} of the data, but the "
                f"tensor before it ends at byte {reached}; fetch the file again"
            )
        reached = entry.end
    if reached != size:
        raise WeightsError(
            f"{path} is a {'truncated' if reached > size else 'damaged'} safetensors file: its header promises "
            f"{reached} bytes of data, but there are {size}; fetch the file again"
        )


class _NotLoaded:
    """Stands for a Python object of a file: becomes an empty mapping, in which only its attributes are kept."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()  # PyTorch fills no other mapping.


class _NotLoadedNumpy:
    """Stands for a number of NumPy, whose state is not a mapping."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_pickle(path: Path, *, mmap: bool) -> Any:
    try:
        if path.suffix == ".safetensors":  # torch.load would go by the name
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        try:
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        except pickle.UnpicklingError as error:
            return _read_without_objects(path, error, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"such as {found[1]}" if found else "or was not written by torch.save"
        raise WeightsError(
            f"{path} holds Python objects other than tensors, numbers and text ({what}); such objects can run code "
            "when they are loaded, so they are refused: save only the state dict, torch.save(model.state_dict(), path)"
        ) from error
    except EOFError as error:
        raise WeightsError(
            f"{path} is truncated: it ends in the middle of a checkpoint; fetch the file again"
        ) from error
    except RuntimeError as error:
        reason = str(error).partition("\n")[0][:200]
        raise WeightsError(
            f"{path} is not a PyTorch checkpoint, or is damaged or truncated: {reason}; fetch the file again"
        ) from error


def _read_without_objects(path: Path, refusal: pickle.UnpicklingError, *, mmap: bool) -> Any:
    # Trainers save their settings (argparse.Namespace, ...) beside the tensors. PyTorch still checks each step, and
    # runs no code of theirs.
    if not zipfile.is_zipfile(path):
        raise refusal
    names = sorted(get_unsafe_globals_in_checkpoint(path))
    stand_ins: list[Any] = [(_NotLoadedNumpy if name.startswith("numpy.") else _NotLoaded, name) for name in names]
    try:
        with safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except (pickle.UnpicklingError, TypeError, ValueError, AttributeError):
        raise refusal from None
    logger.info("%s: did not load its Python objects (%s)", path, ", ".join(names))
    return content


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _read_safetensors(path: Path, *, mmap: bool) -> dict[str, Tensor]:
    # Not read with the package of that name, so that PyTorch is the only requirement.
    header = read_safetensors_header(path)
    tensors = _map_tensors(path, header) if mmap else _read_tensors(path, header)
    return {
        name: tensors[name].view(entry.dtype).reshape(entry.shape)
        if entry.begin < entry.end
        else torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        for name, entry in header.entries.items()
    }


def _read_tensors(path: Path, header: SafetensorsHeader) -> dict[str, Tensor]:
    """Read the bytes of each tensor straight into memory of its own, in the order in which they are in the file."""
    contents = {}
    with path.open("rb") as file:
        file.seek(header.start)
        for name, entry in sorted(header.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            content = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu")
            if file.readinto(content.numpy().data) < content.nbytes:
                raise WeightsError(f"{path} became shorter while it was read; fetch the file again")
            contents[name] = content
    return contents


def _map_tensors(path: Path, header: SafetensorsHeader) -> dict[str, Tensor]:
    size = path.stat().st_size
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    contents = {}
    for name, entry in header.entries.items():
        begin, end = header.start + entry.begin, header.start + entry.end
        content = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage[begin:end])
        # Computing on unaligned memory is slow or forbidden.
        contents[name] = content.clone() if begin % entry.dtype.itemsize else content
    return contents


def _describe(head: bytes) -> str:
    expected = "expected what torch.save or safetensors wrote"
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return f"it is {kind}; {expected}"
    text = head.decode("utf-8", errors="ignore")
    if not text.strip().isprintable() and not text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
        return f"it begins with the bytes {head[:8].hex(' ')}; {expected}"
    beginning = " ".join(text.split())[:60]
    if beginning.startswith("<"):
        return (
            f"it is a web page or an XML error message: {beginning!r}, which servers send without access or for an "
            "expired link; fetch the file again"
        )
    if beginning.startswith("version https://git-lfs"):
        return "it is a git-lfs pointer instead of the file: git lfs pull fetches the file"
    return f"it is text: {beginning!r}; {expected}"
