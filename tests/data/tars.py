"""Small images and tar archives for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image


def png(value: int, size: tuple[int, int] = (6, 5)) -> bytes:
    """An encoded image of one gray value."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes], *, mode: str = "w", format: int = tarfile.PAX_FORMAT) -> Path:
    """An archive with these members, in order; `mode` as of `tarfile.open`, e.g. `w:gz`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=format) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def cut_off(path: Path, size: int) -> Path:
    """Keep the first `size` bytes of a file."""
    path.write_bytes(path.read_bytes()[:size])
    return path
