"""From what users give as `weights=` to a file on this machine.

Local files are used where they lie. Downloads go to the cache of torch.hub, under the last part of their URL.
"""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname
from uuid import uuid4

import torch

from dinov3.hub.files import WeightsError, read_file

BASE_URL = "https://dl.fbaipublicfiles.com/dinov3"


def is_url(path: str) -> bool:
    """Whether `path` is an https or file URL."""
    return urlparse(path).scheme in ("https", "file")


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
        WeightsError: the hash differs, or what was downloaded is no checkpoint.
        ValueError: another kind of URL, or `check_hash` for a name without a hash.
    """
    text = os.fspath(weights)
    scheme = urlparse(text).scheme
    if scheme in ("https", "http"):
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
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        if check_hash:
            _check_hash(path, name)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{name}.{uuid4().hex}.partial")
    try:
        _fetch(url, partial, progress=progress)
        if check_hash:
            _check_hash(partial, name)
        read_file(partial)  # What is truncated or a log-in page must not become the cached file.
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _fetch(url: str, path: Path, *, progress: bool) -> None:
    try:
        torch.hub.download_url_to_file(url, str(path), progress=progress)
    except urllib.error.URLError as error:
        reason = f"HTTP {error.code} {error.reason}" if isinstance(error, urllib.error.HTTPError) else error.reason
        # Without the query: it may be a signature that gives access.
        raise ConnectionError(
            f"could not download {url.partition('?')[0]}: {reason}. The published weights are gated: accept their "
            "license to get a signed URL, and pass that as weights=, or fetch the file yourself and pass weights=PATH"
        ) from error


def _check_hash(path: Path, name: str) -> None:
    found = re.search(r"-([0-9a-f]{8,64})(\.[a-z]+)*$", name)
    if not found or not path.is_file():
        raise ValueError(f"check_hash=True, but {name} is no file whose name ends in -<hash>.pth")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(found[1]):
        raise WeightsError(
            f"{path} is not the file that its name promises: its SHA-256 begins with {digest[: len(found[1])]}, not "
            f"with {found[1]}; it was damaged or changed, fetch it again"
        )
