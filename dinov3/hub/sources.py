"""From what users give as `weights=` to a published file, a file on this machine, or a state dict.

Local files are used where they lie. Downloads go to the cache of torch.hub. There only a name that ends in `-<hash>`,
as those of published files do, means one file; every other name gets a digest of the URL, because the last parts of
many URLs are equal (`model.safetensors`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from torch import Tensor

from dinov3.hub.downloads import GATED, download, without_query
from dinov3.utils.messages import did_you_mean
from dinov3.utils.weight_files import WeightsError, read_file

BASE_URL = "https://dl.fbaipublicfiles.com/dinov3"

#: Weights that are not the published ones: a path, a URL or a state dict.
Source = str | os.PathLike[str] | Mapping[str, Tensor]

_HASH = re.compile(r"-([0-9a-f]{8,64})(\.[a-z]+)*$")

Published = TypeVar("Published", bound=Enum)
Entries = TypeVar("Entries")


def is_url(path: str) -> bool:
    """Return whether `path` is an https or file URL."""
    return urlparse(path).scheme in ("https", "file")


def convert_path_or_url_to_url(path: str) -> str:
    """Return an https or file URL as it is; anything else is taken for a local path and becomes a file URL."""
    return path if is_url(path) else Path(path).expanduser().resolve().as_uri()


def choose_weights(
    target: str,
    weights: Enum | Source,
    published: Collection[Published],
    *,
    pretrained: bool,
    selectors: Mapping[str, Any],
) -> Published | Source:
    """Decide between published weights, which may be given by their name, and weights from elsewhere.

    Args:
        target: the model or head that the weights are for, as error messages name it.
        weights: what the user gave.
        published: the data for which weights of `target` were published.
        pretrained: whether any weights are to be read.
        selectors: keyword arguments that select among published files (`hash`, `version`), with their values.

    Returns:
        A member of `published`, or `weights`.

    Raises:
        ValueError: such weights were not published; or other weights are given with `pretrained=False` or a selector.
        FileNotFoundError: a misspelt name of published weights.
        TypeError: weights of another type.
    """
    choices = type(next(iter(published)))
    if isinstance(weights, str) and weights.upper() in choices.__members__:
        weights = choices[weights.upper()]
    elif (
        isinstance(weights, str) and (hint := did_you_mean(weights, choices.__members__)) and not Path(weights).exists()
    ):
        raise FileNotFoundError(f"no weights at {weights}{hint}: there is no such file or directory")
    if isinstance(weights, Enum):
        for member in published:
            if member is weights:
                return member
        names = ", ".join(member.name for member in published)
        raise ValueError(f"{target} was not published with weights {weights.name}, only with {names}")
    if not isinstance(weights, str | os.PathLike | Mapping):
        raise TypeError(
            f"{target}: weights must be a {choices.__name__}, a path, a URL or a state dict, got {weights!r}"
        )
    if not pretrained:
        raise ValueError(f"{target}: weights are given, but pretrained=False reads none; leave out one of the two")
    if given := [name for name, value in selectors.items() if value]:
        raise ValueError(
            f"{target}: {' and '.join(given)} can only select published weights, but other weights are given"
        )
    return weights


def check_file_hash(given: str, known: Collection[str]) -> str:
    """Return digits of a hash, which select a published file, if they may be meant as they are.

    Args:
        given: what the user gave.
        known: those of the files that were published.

    Raises:
        ValueError: they are not digits of a hash, or almost those of a known file.
    """
    near = did_you_mean(given, known, cutoff=0.75)
    if not re.fullmatch("[0-9a-f]{8,64}", given) or (near and given not in known):
        raise ValueError(
            f"hash={given!r}{near}: expected the digits at the end of a published file's name, such as {min(known)!r}"
        )
    return given


def read_weights(
    weights: str | os.PathLike[str], read: Callable[[Path], Entries], *, check_hash: bool = False, progress: bool = True
) -> tuple[Entries, str]:
    """Locate weights, downloading them if need be, and read them.

    Args:
        weights: see `locate`.
        read: reads the local file or directory.
        check_hash: see `locate`.
        progress: see `locate`.

    Returns:
        What `read` returns, and where it comes from, for error messages.

    Raises:
        WeightsError: what `read` raises; for downloads see `naming_download`.
        OSError, ValueError: see `locate`.
    """
    path = locate(weights, check_hash=check_hash, progress=progress)
    with naming_download(weights, path):
        return read(path), describe_source(weights, path)


def describe_source(weights: str | os.PathLike[str], path: Path) -> str:
    """Name weights in messages: the local path, and for downloads the URL as well."""
    return f"{path} (downloaded from {without_secrets(weights)})" if is_download(weights) else str(path)


def without_secrets(weights: str | os.PathLike[str]) -> str:
    """Return what the user gave in a form that can be shown, see `without_query`."""
    return without_query(os.fspath(weights)) if is_download(weights) else os.fspath(weights)


@contextlib.contextmanager
def naming_download(weights: str | os.PathLike[str], path: Path) -> Iterator[None]:
    """Say in a `WeightsError` of the body which URL the file in the cache came from, and how to fetch it again.

    Args:
        weights: as the user gave them; errors about local ones stay as they are.
        path: as returned by `locate`.
    """
    try:
        yield
    except WeightsError as error:
        if not is_download(weights):
            raise
        hint = f"{path} was downloaded from {without_secrets(weights)}: delete it to download it again"
        raise WeightsError(f"{error} ({hint})") from error


def locate(weights: str | os.PathLike[str], *, check_hash: bool = False, progress: bool = True) -> Path:
    """Return the local path of some weights, which are downloaded if they are not here yet.

    Args:
        weights: a path (`~` is the home directory), or a file, https or http URL.
        check_hash: compare the SHA-256 of the file with the digits at the end of its name.
        progress: show a bar while downloading.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ConnectionError: the download failed.
        OSError: the disk is too small for the download.
        WeightsError: the hash differs, or the download is not a checkpoint.
        ValueError: another kind of URL, or `check_hash` for a name without a hash.
    """
    text = os.fspath(weights)
    scheme = urlparse(text).scheme
    if is_download(text):
        return _download(text, check_hash=check_hash, progress=progress)
    if scheme != "file" and "://" in text:
        raise ValueError(
            f"weights={text!r}: cannot read {scheme}:// URLs, only https, http and file URLs and local paths"
        )
    path = Path(url2pathname(urlparse(text).path)) if scheme == "file" else Path(text).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: there is no such file or directory")
    if check_hash:
        _check_hash(path, path.name)
    return path


def is_download(weights: str | os.PathLike[str]) -> bool:
    """Return whether weights have to be fetched from a server."""
    return urlparse(os.fspath(weights)).scheme in ("https", "http")


def _download(url: str, *, check_hash: bool, progress: bool) -> Path:
    name = os.path.basename(urlparse(url).path)
    if not name:
        raise ValueError(f"weights={without_query(url)!r}: the URL does not name a file")
    path = Path(torch.hub.get_dir()) / "checkpoints" / _cache_name(url)
    if path.exists():  # Not compared with the server's file: its signed URL may have expired.
        if check_hash:
            with naming_download(url, path):
                _check_hash(path, name)
        return path
    if check_hash:
        _hash_in(name)  # Refuses a name without a hash before gigabytes arrive.

    def check(partial: Path) -> None:
        # A truncated file or a log-in page must not become the cached file.
        try:
            read_file(partial, mmap=True)  # only its structure
            if check_hash:
                _check_hash(partial, name)
        except WeightsError as error:
            reason = str(error).replace(str(partial), "what the server sent")
            raise WeightsError(f"{without_query(url)} did not return usable weights: {reason}. {GATED}") from error

    download(url, path, progress=progress, check=check)
    return path


def _cache_name(url: str) -> str:
    name = os.path.basename(urlparse(url).path)
    found = _HASH.search(name)
    if found and not found[1].isdecimal():  # which may be a date or a step, as in checkpoint-00010000.pth
        return name
    stem, ending = os.path.splitext(name)
    # Without an ending it is no file's name: then the query selects the file, as in download?id=3.
    digest = hashlib.sha256((without_query(url) if ending else url).encode()).hexdigest()
    return f"{stem}_{digest[:16]}{ending}"


def _check_hash(path: Path, name: str) -> None:
    expected = _hash_in(name)
    if not path.is_file():
        raise ValueError(f"check_hash=True, but {path} is a directory: only files have a hash")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(expected):
        raise WeightsError(
            f"{path} does not match the hash in its name: its SHA-256 starts with {digest[: len(expected)]}, not with "
            f"{expected}; it was damaged or changed, so fetch it again"
        )


def _hash_in(name: str) -> str:
    found = _HASH.search(name)
    if not found:
        raise ValueError(f"check_hash=True, but the name of {name} does not end in -<hash>.pth")
    return found[1]
