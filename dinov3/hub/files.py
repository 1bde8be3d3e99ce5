"""What a weights file holds, told by its content and never by its name; no code in it is run.

PyTorch checkpoints in zip form and safetensors are memory-mapped: tensors are read from the disk when they are first
used, and writing to them changes a private copy. The file must stay in place while its tensors are in use.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_METADATA = "torch.distributed.checkpoint.metadata"
#: Everything that the index of a distributed checkpoint is made of, besides the dtypes.
_INDEX_PARTS = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath")),
    *(("pathlib._local", name) for name in ("PosixPath", "WindowsPath")),
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_METADATA, name) for name in ("TensorProperties", "TensorStorageMetadata")),
    *((_METADATA, name) for name in ("ChunkStorageMetadata", "BytesStorageMetadata")),
}

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


def read_file(path: Path, *, mmap: bool = True) -> Mapping[str, Any]:
    """Read a PyTorch checkpoint or a safetensors file.

    Args:
        path: an existing file.
        mmap: map zip-format checkpoints into memory instead of reading them; safetensors are always mapped.

    Returns:
        The mapping that the file holds; its tensors are on the CPU.

    Raises:
        WeightsError: the file is empty, truncated, no checkpoint, or holds more than plain data.
        ModuleNotFoundError: a safetensors file, but the package safetensors is missing.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise WeightsError(f"{path} is empty (0 bytes): the download or the copy failed, fetch the file again")
    if _is_safetensors(head):
        return _read_safetensors(path)
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


def check_index(path: Path) -> None:
    """Refuse the index file (`.metadata`) of a distributed checkpoint that is damaged or could run code.

    torch unpickles it without restrictions when it loads the checkpoint.

    Raises:
        WeightsError: the index is not what `torch.distributed.checkpoint` writes.
    """
    try:
        with path.open("rb") as file:
            _IndexUnpickler(file).load()
    except Exception as error:
        raise WeightsError(f"{path} is not the index of a distributed checkpoint, or is damaged: {error}") from error


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _INDEX_PARTS and not is_dtype:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which could run code")
        return super().find_class(module, name)


def _read_pickle(path: Path, *, mmap: bool) -> Any:
    try:
        if path.suffix == ".safetensors":  # By this name torch.load would take it for what it is not.
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"such as {found[1]}" if found else "or was not written by torch.save"
        raise WeightsError(
            f"{path} holds Python objects other than tensors, numbers and text ({what}); such objects can run code "
            "when they are loaded, so they are refused: save the state dict alone, torch.save(model.state_dict(), path)"
        ) from error
    except EOFError as error:
        raise WeightsError(
            f"{path} is truncated: it ends in the middle of a checkpoint; fetch the file again"
        ) from error
    except RuntimeError as error:
        reason = str(error).partition("\n")[0][:200]
        raise WeightsError(f"{path} is not a PyTorch checkpoint, or is damaged or truncated: {reason}") from error


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} is a safetensors file: to read it, pip install safetensors") from error
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is a damaged or truncated safetensors file ({error}); fetch it again") from error


def _describe(head: bytes) -> str:
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return f"it is {kind}"
    text = head.decode("utf-8", errors="ignore")
    if not text.strip().isprintable() and not text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
        return f"it begins with the bytes {head[:8].hex(' ')}"
    beginning = " ".join(text.split())[:60]
    if beginning.startswith("<"):
        return f"it is a web page or an XML error message (a failed download?): {beginning!r}"
    return f"it is text: {beginning!r}"
