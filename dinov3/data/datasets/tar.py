"""Tar archives: where their members lie, in one pass over the headers, and where an archive breaks off.

Notable:
- Only headers are read, and what the caller wants at once; all else is fetched later by its offset.
- GNU and PAX long names, whose headers take more than one block, are followed.
- An archive without its end mark is reported: whoever wrote it did not finish.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

BLOCK = 512
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

_COMPRESSED: dict[str, Callable[[str], BinaryIO]] = {
    ".gz": cast(Callable[[str], BinaryIO], gzip.open),
    ".tgz": cast(Callable[[str], BinaryIO], gzip.open),
    ".bz2": cast(Callable[[str], BinaryIO], bz2.open),
    ".tbz2": cast(Callable[[str], BinaryIO], bz2.open),
    ".xz": cast(Callable[[str], BinaryIO], lzma.open),
    ".txz": cast(Callable[[str], BinaryIO], lzma.open),
}
_LONG_NAME = b"L"
_EXTENDED = (_LONG_NAME, b"K", b"x", b"g", b"X")


class BrokenTarError(ValueError):
    """An archive that ends early or is damaged; the message names it and the byte."""


class TarHeaderError(ValueError):
    """There is no valid header where a member should begin."""


class CutOffHeaderError(TarHeaderError):
    """The archive ends inside of a header, or before one."""


class TarMember(NamedTuple):
    """One entry of an archive; offsets count bytes of the uncompressed archive.

    Attributes:
        name: its path.
        start: of its first header.
        data: of its content.
        size: of its content.
        is_file: whether it is a regular file.
        content: if it was wanted, else None.
    """

    name: str
    start: int
    data: int
    size: int
    is_file: bool
    content: bytes | None = None

    @property
    def end(self) -> int:
        """Where the next member starts."""
        return self.data + _padded(self.size)


def is_tar(name: str) -> bool:
    """Whether a file is named like an archive, compressed or not."""
    return name.lower().endswith(SUFFIXES)


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether an archive can only be read from its start."""
    return Path(path).suffix.lower() in _COMPRESSED


def open_tar(path: str | os.PathLike[str]) -> BinaryIO:
    """The uncompressed bytes of an archive, as a file; seeking back in a compressed one starts from its beginning."""
    opener = _COMPRESSED.get(Path(path).suffix.lower())
    return cast(BinaryIO, open(path, "rb", buffering=0)) if opener is None else opener(os.fspath(path))


def iter_members(
    file: BinaryIO, path: str | os.PathLike[str], wants_content: Callable[[TarMember], bool] = lambda _: False
) -> Iterator[TarMember]:
    """The members of an archive that are wholly there, in order.

    Args:
        file: as `open_tar` gives it.
        path: of the archive, for the error.
        wants_content: whether to read the content of a member.

    Raises:
        BrokenTarError: after the last whole member, if the archive ends early or is damaged there.
    """
    size = None if is_compressed(path) else os.stat(path).st_size
    offset = 0

    def read(start: int, count: int) -> bytes:
        file.seek(start)
        return file.read(count)

    while True:
        try:
            member = read_member(read, offset)
            if member is None:
                return
            if wants_content(member):  # now, in a compressed archive there is no way back
                member = member._replace(content=read(member.data, member.size))
            missing = member.end > size if size is not None else member.size and not read(member.end - 1, 1)
        except TarHeaderError as error:
            early = isinstance(error, CutOffHeaderError)
            problem = "ends early, without an end-of-archive mark" if early else f"is damaged ({error})"
            raise BrokenTarError(
                f"{path} {problem}, at byte {offset if size is None or not early else size}"
            ) from error
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise BrokenTarError(
                f"{path} ends early or is damaged, at byte {offset} of its uncompressed content: "
                f"{type(error).__name__}: {error}"
            ) from error
        if missing:
            at = f"at byte {size}" if size is not None else "in its last member"
            raise BrokenTarError(
                f"{path} ends early, {at}: its member {member.name!r} takes the bytes {member.start} to {member.end}"
            )
        yield member
        offset = member.end


def read_member(read: Callable[[int, int], bytes], start: int) -> TarMember | None:
    """The member whose first header lies at byte `start`.

    Args:
        read: gives bytes by offset and count.
        start: of the header.

    Returns:
        The member, or None at the end of the archive.

    Raises:
        TarHeaderError: there is no valid header.
    """
    offset, long_name = start, None
    while True:
        block = _read_whole(read, offset, BLOCK)
        if offset == start and not any(block):
            return None
        header = _parse_header(block)
        offset += BLOCK
        if header.type not in _EXTENDED:
            has_data = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
            return TarMember(long_name or header.name, start, offset, header.size if has_data else 0, header.isreg())
        if header.type == _LONG_NAME:
            long_name = _text(_read_whole(read, offset, header.size).rstrip(b"\0"))
        elif header.type != b"K":
            long_name = _pax_path(_read_whole(read, offset, header.size)) or long_name
        offset += _padded(header.size)


def _read_whole(read: Callable[[int, int], bytes], offset: int, size: int) -> bytes:
    data = read(offset, size)
    if len(data) < size:
        raise CutOffHeaderError(f"{len(data)} of {size} bytes of a header")
    return data


def _parse_header(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise TarHeaderError(str(error)) from error


def _pax_path(records: bytes) -> str | None:
    # Records are `<length> <key>=<value>\n`, where the length counts all of it.
    while records:
        digits = records.partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        if not 0 < length <= len(records):
            raise TarHeaderError("bad PAX record")
        key, _, value = records[:length].partition(b" ")[2].partition(b"=")
        if key == b"path":
            return _text(value[:-1])
        records = records[length:]
    return None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
