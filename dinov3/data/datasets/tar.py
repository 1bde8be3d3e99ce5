"""Tar archives: where their files lie, found in one pass over the headers, and whether an archive ends early."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

_OPENERS: dict[str, Any] = {
    **dict.fromkeys((".gz", ".tgz"), gzip.open),
    **dict.fromkeys((".bz2", ".tbz2"), bz2.open),
    **dict.fromkeys((".xz", ".txz"), lzma.open),
}


class BrokenTarError(ValueError):
    """An archive that ends early or is damaged; the message names it and the byte."""


class TarMember(NamedTuple):
    """One file of an archive; offsets count bytes of the uncompressed archive.

    Attributes:
        name: its path.
        start: where its first header begins.
        data: where its content begins.
        size: of its content.
        end: where the next member begins.
        content: if it was asked for, else None.
        target: of a hard or symbolic link, which has no content of its own, the normalised path of the member that it
            stands for; None for a file.
    """

    name: str
    start: int
    data: int
    size: int
    end: int
    content: bytes | None
    target: str | None = None


def is_tar(name: str) -> bool:
    """Whether a file is named like an archive, compressed or not."""
    return name.lower().endswith(SUFFIXES)


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether an archive can only be read from its start."""
    return Path(path).suffix.lower() in _OPENERS


def open_tar(path: str | os.PathLike[str]) -> BinaryIO:
    """Open the uncompressed bytes of an archive; seeking back in a compressed one starts again from its beginning."""
    return _OPENERS.get(Path(path).suffix.lower(), open)(path, "rb")


def iter_files(
    path: str | os.PathLike[str], wants_content: Callable[[str], bool] = lambda name: False
) -> Iterator[TarMember]:
    """Yield the files and links of an archive that are complete, in order; see `resolve_links`.

    Args:
        path: the archive.
        wants_content: whether to read the content of a file of this name. It is read on the way, because a compressed
            archive cannot go back.

    Raises:
        BrokenTarError: after the last complete file, if the archive ends early or is damaged there.
    """
    position = 0
    with open_tar(path) as file:
        try:
            archive: Any  # its `members` are not typed
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # it would keep all of them
                    content = None
                    if member.isreg() and wants_content(member.name):
                        file.seek(member.offset_data)
                        content = file.read(member.size)
                    # `tarfile` would notice missing data only at the next member.
                    if archive.offset > file.tell():
                        file.seek(archive.offset - 1)
                        if not file.read(1):
                            ends = f"its member {member.name!r} takes the bytes {member.offset} to {archive.offset}"
                            raise tarfile.ReadError(ends)
                    if member.isreg() or member.islnk() or member.issym():
                        start, data = member.offset, member.offset_data
                        size = member.size if member.isreg() else 0
                        yield TarMember(member.name, start, data, size, archive.offset, content, _target(member))
                    position = archive.offset
            # `tarfile` also takes an invalid or missing header for the end; the real end is a block of zeros.
            file.seek(position)
            mark = file.read(BLOCK)
            if len(mark) < BLOCK:
                raise tarfile.ReadError("it has no end-of-archive mark")
            if any(mark):
                tarfile.TarInfo.frombuf(mark, "utf-8", "surrogateescape")
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if is_compressed(path):
                where = f"ends early or is damaged, at byte {position} of its uncompressed content"
                raise BrokenTarError(f"{path} {where}: {type(error).__name__}: {error}") from error
            size = os.stat(path).st_size
            if file.tell() >= size:
                raise BrokenTarError(f"{path} ends early, at byte {size}: {error}") from error
            raise BrokenTarError(f"{path} is damaged ({error}), at byte {position}") from error


def resolve_links(members: Iterable[TarMember]) -> list[TarMember]:
    """Give each link of an archive the place and content of the file that it leads to.

    `tar` stores the second name of a hard-linked file as a link, and symbolic links as they are.

    Args:
        members: all of an archive, in order.

    Returns:
        The same members. Where a link leads to nothing in the archive, its `target` is kept, otherwise it is None.
    """
    members = list(members)
    if all(member.target is None for member in members):
        return members
    found: dict[str, TarMember] = {}
    unresolved = []
    for place, member in enumerate(members):
        if member.target is not None and member.target in found:
            members[place] = member = found[member.target]._replace(name=member.name)
        if member.target is None:
            found[posixpath.normpath(member.name)] = member
        else:
            unresolved.append(place)
    # A symbolic link may come before what it leads to, which may be a link, too.
    links = {posixpath.normpath(members[place].name): members[place].target for place in unresolved}
    for place in unresolved:
        target = members[place].target
        for _ in links:
            if target in found or target is None:
                break
            target = links.get(target)
        if target is not None and target in found:
            members[place] = found[target]._replace(name=members[place].name)
    return members


def content_of_first_member(blocks: bytes) -> bytes | None:
    """Return the content of the member that begins an archive's bytes, or None if none begins there."""
    try:
        with tarfile.open(fileobj=io.BytesIO(blocks), mode="r:", encoding="utf-8") as archive:
            member = archive.next()
    except tarfile.TarError:
        return None
    return None if member is None else blocks[member.offset_data : member.offset_data + member.size]


def _target(member: tarfile.TarInfo) -> str | None:
    if member.islnk():
        return posixpath.normpath(member.linkname)  # counts from the root of the archive
    if member.issym():
        return posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname))
    return None
