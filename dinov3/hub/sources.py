"""From what users give as `weights=` to a file on this machine.

Local files are used where they lie. Downloads go to the cache of torch.hub, under the last part of their URL.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

from dinov3.hub.downloads import GATED, download, without_query
from dinov3.utils.weight_files import WeightsError, read_file

BASE_URL = "https://dl.fbaipublicfiles.com/dinov3"


def is_url(path: str) -> bool:
    """Whether `path` is an https or file URL."""
    return urlparse(path).scheme in ("https", "file")


def is_download(weights: str | os.PathLike[str]) -> bool:
    """Whether `weights` is what `locate` downloads: an https or http URL."""
    return urlparse(os.fspath(weights)).scheme in ("https", "http")


def convert_path_or_url_to_url(path: str) -> str:
    """An https or file URL as it is; anything else is taken for a local path and becomes a file URL."""
    return path if is_url(path) else Path(path).expanduser().resolve().as_uri()


def locate(weights: str | os.PathLike[str], *, check_hash: bool = False, progress: bool = True) -> Path:
    """The local path of some weights, downloaded if they are not here yet.

    Args:
        weights: a path (`~` is the home directory), or a file, https or http URL.
        check_hash: compare the SHA-256 of the file with the digits at the end of its name.
        progress: show a bar while downloading.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ConnectionError: the download failed.
        OSError: the disk is too small for the download.
        WeightsError: the hash differs, or what was downloaded is no checkpoint.
        ValueError: another kind of URL, or `check_hash` for a name without a hash.
    """
    text = os.fspath(weights)
    scheme = urlparse(text).scheme
    if is_download(text):
        return _download(text, check_hash=check_hash, progress=progress)
    if scheme != "file" and "://" in text:
        raise ValueError(
            f"weights={text!r}: cannot read {scheme}:// URLs, only https, http and file ones and local paths"
        )
    path = Path(url2pathname(urlparse(text).path)) if scheme == "file" else Path(text).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: there is no such file or directory")
    if check_hash:
        _check_hash(path, path.name)
    return path


def _download(url: str, *, check_hash: bool, progress: bool) -> Path:
    name = os.path.basename(urlparse(url).path)
    if not name:
        raise ValueError(f"weights={without_query(url)!r}: the URL names no file")
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        if check_hash:
            _check_hash(path, name)
        return path
    if check_hash:
        _digits_in(name)

    def check(partial: Path) -> None:
        # What is truncated or a log-in page must not become the cached file.
        try:
            read_file(partial)
            if check_hash:
                _check_hash(partial, name)
        except WeightsError as error:
            reason = str(error).replace(str(partial), "what the server sent")
            raise WeightsError(f"{without_query(url)} gave no weights that can be used: {reason}. {GATED}") from error

    download(url, path, progress=progress, check=check)
    return path


def _check_hash(path: Path, name: str) -> None:
    digits = _digits_in(name)
    if not path.is_file():
        raise ValueError(f"check_hash=True, but {path} is a directory: only files have a hash")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(digits):
        raise WeightsError(
            f"{path} is not the file that its name promises: its SHA-256 begins with {digest[: len(digits)]}, not "
            f"with {digits}; it was damaged or changed, fetch it again"
        )


def _digits_in(name: str) -> str:
    found = re.search(r"-([0-9a-f]{8,64})(\.[a-z]+)*$", name)
    if not found:
        raise ValueError(f"check_hash=True, but {name} is no file whose name ends in -<hash>.pth")
    return found[1]
