"""Text that people wrote, on any system, and terminals that cannot show all of it.

Notable: file names are bytes. Names from old zip archives are often not UTF-8; Python stands in for such bytes with
lone surrogates, which it turns back into the same bytes when a file is opened, but refuses to write.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from pathlib import Path

#: A byte-order mark, as Windows puts it at the start, and the encoding that it announces.
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file in UTF-8 or with a byte-order mark, with any kind of line ends, which become `\\n`.

    Bytes that are not UTF-8 are kept as in file names (`os.fsdecode`).
    """
    data = Path(path).read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    # UTF-16 cannot be escaped like this, and has no file names of old archives in it.
    text = data.decode(encoding, errors="replace" if encoding == "utf-16" else "surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Read the lines of a text file, without their ends; see `read_text`."""
    # Not `str.splitlines`, which also splits at characters that names may contain.
    lines = read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def escape_what_cannot_be_printed() -> None:
    """Let standard output and error show characters that they cannot encode as `\\xe9` instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none, and takes everything
            with contextlib.suppress(OSError, ValueError):  # closed, or another file since Python has opened it
                stream.reconfigure(errors="backslashreplace")
