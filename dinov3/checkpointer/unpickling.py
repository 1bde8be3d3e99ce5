"""Reading checkpoint directories without running code that somebody may have put into them.

torch.distributed.checkpoint unpickles the index (`.metadata`) and every entry that is no tensor without restrictions.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

INDEX = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
#: Everything that the index is made of, besides the dtypes.
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


class SafeReader(FileSystemReader):
    """Reads directories whose index is what `torch.distributed.checkpoint` writes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            pickle.UnpicklingError: it is something else, which could run code.
        """
        with (Path(self.path) / INDEX).open("rb") as file:
            _IndexUnpickler(file).load()
        return super().read_metadata()


class SafeLoadPlanner(DefaultLoadPlanner):
    """Loads tensors and plain data: numbers, text, lists, dictionaries."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take in an entry that is no tensor, if nothing but plain data is in it."""
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = f"it refers to {found[1]}, which could run code" if found else str(error)
            raise pickle.UnpicklingError(
                f"the entry {read_item.storage_index.fqn!r} holds more than plain data: {what}"
            ) from error
        value.seek(0)
        super().load_bytes(read_item, value)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _INDEX_PARTS and not is_dtype:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which could run code")
        return super().find_class(module, name)
