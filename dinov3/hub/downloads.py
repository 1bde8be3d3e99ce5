"""Large files from the network: complete, or not there at all.

Notable:
- What has arrived is kept in `<name>.<digits for the server's version of the file>.partial`, beside the final file.
  After a broken connection it is continued, by the same or a later call; if the server cannot continue, or has another
  version by now, the download starts again.
- If several processes want the same file, one downloads it and the others wait.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO
from uuid import uuid4

from dinov3.utils.posix import fcntl

TIMEOUT = 60.0  # seconds without a byte
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt, counted again after each that brings a byte
CHUNK = 2**20  # bytes

GATED = (
    "The published weights are gated: accept their license to get a signed URL (which expires after a while), and pass "
    "that as weights=, or fetch the file yourself and pass weights=PATH"
)


Response = http.client.HTTPResponse


class _BrokenConnection(Exception):
    pass


def download(url: str, path: Path, *, progress: bool, check: Callable[[Path], None]) -> None:
    """Download a file, unless it appears at `path` meanwhile.

    Args:
        url: http or https. Its query, which may be a signature, is kept out of messages.
        path: where the file goes, once it is complete and checked.
        progress: show a bar.
        check: called with the complete file under its temporary name. If it raises, the file is removed.

    Raises:
        ConnectionError: the server refuses, cannot be reached, or the connection keeps breaking.
        OSError: the disk is too small.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        response = _request(url)
    except _BrokenConnection as error:
        raise ConnectionError(
            f"could not download {without_query(url)}: {error}. Check the network, or fetch the file elsewhere and "
            "pass weights=PATH"
        ) from error
    validator, length = _validator(response), _length(response)
    # A server that does not say which version it has cannot continue this one.
    version = hashlib.sha256(f"{validator} {length}".encode()).hexdigest() if validator else uuid4().hex
    partial = path.with_name(f"{path.name}.{version[:12]}.partial")
    with response, _locked(partial):
        try:
            if path.exists():  # Another process was faster.
                return
            _fetch(url, response, partial, progress=progress)
            try:
                check(partial)
            except Exception:
                partial.unlink()
                raise
            partial.replace(path)
        finally:
            if partial.exists() and (validator is None or partial.stat().st_size == 0):
                partial.unlink()  # A later call could not continue it.
    for other in path.parent.iterdir():
        if re.fullmatch(re.escape(path.name) + r"\.[0-9a-f]+\.partial", other.name):
            _remove_unless_locked(other)


def without_query(url: str) -> str:
    """Return a URL that can be shown: its query may be a signature that gives access, as a user before the host is."""
    return re.sub("//[^/@]*@", "//", re.split(r"[?#]", url, maxsplit=1)[0])


def _fetch(url: str, first_response: Response, partial: Path, *, progress: bool) -> None:
    response: Response | None = first_response
    length, validator = _length(first_response), _validator(first_response)
    with partial.open("ab") as file:
        if length is not None and file.tell() > length:
            _empty(file)
        start = most = file.tell()
        if start == length:
            return
        free = shutil.disk_usage(partial.parent).free
        if length is not None and length - start > free:
            raise OSError(
                errno.ENOSPC,
                f"the download still needs {(length - start) / 1e9:.1f} GB in {partial.parent}, but only "
                f"{free / 1e9:.1f} GB are free there: make room, or set the environment variable TORCH_HOME to a "
                "directory on another disk",
            )
        if start > 0:
            first_response.close()
            response = None
        failures = 0
        with _bar(os.path.basename(without_query(url)), start, length, shown=progress) as bar:
            while True:
                try:
                    if response is None:
                        response = _request_rest(url, file, validator, bar)
                        validator = _validator(response) or validator
                    _append(response, file, bar)
                    return
                except _BrokenConnection as error:
                    if response is not None:
                        response.close()
                    response = None
                    failures = 1 if file.tell() > most else failures + 1
                    most = max(most, file.tell())
                    if failures > len(WAITS):
                        of_all = "" if length is None else f" of {length / 1e6:.1f}"
                        raise ConnectionError(
                            f"could not download {without_query(url)}: {error}; {len(WAITS) + 1} attempts in a row "
                            f"brought nothing more. {file.tell() / 1e6:.1f}{of_all} MB have arrived; if the server "
                            f"allows it, the next call continues from there ({partial})"
                        ) from error
                    time.sleep(WAITS[failures - 1])


def _request_rest(url: str, file: BinaryIO, validator: str | None, bar: Any) -> Response:
    start = file.tell()
    # If-Range lets a server that has another version by now send the whole file instead of the rest of a mixture.
    rest = {} if validator is None else {"Range": f"bytes={start}-", "If-Range": validator}
    response = _request(url, rest)
    if rest and response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        return response
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:  # Another part than the one that was requested.
        response.close()
        response = _request(url)
    bar.update(-start)
    _empty(file)
    return response


def _request(url: str, headers: dict[str, str] | None = None) -> Response:
    headers = {"User-Agent": "dinov3", "Accept-Encoding": "identity"} | (headers or {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except http.client.InvalidURL:
        raise ValueError(
            f"weights={without_query(url)!r}: the URL contains a space, a line break or a bad port"
        ) from None
    except urllib.error.HTTPError as error:
        reason = f"HTTP {error.code} {error.reason}"
        if error.code >= 500 or error.code in (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS):
            raise _BrokenConnection(reason) from error
        raise ConnectionError(f"could not download {without_query(url)}: {reason}. {GATED}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenConnection(str(getattr(error, "reason", error)) or type(error).__name__) from error


def _append(response: Response, file: BinaryIO, bar: Any) -> None:
    length = _length(response)
    end = None if length is None else file.tell() + length
    while True:
        try:
            chunk = response.read(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _BrokenConnection(str(error) or type(error).__name__) from error
        if not chunk:
            break
        file.write(chunk)
        bar.update(len(chunk))
    if end is not None and file.tell() < end:
        raise _BrokenConnection("the connection was closed too early")


def _length(response: Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _validator(response: Response) -> str | None:
    # What If-Range takes: a strong ETag or a date.
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    if fcntl is None:  # On Windows, two processes both download.
        yield
        return
    while True:
        with partial.open("ab") as file:
            with contextlib.suppress(OSError):  # Some network file systems have no locks.
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held the lock may have moved or removed the file, between any two calls here as well.
            try:
                is_the_same = os.path.samestat(partial.stat(), os.fstat(file.fileno()))
            except FileNotFoundError:
                is_the_same = False
            if is_the_same:
                yield
                return


def _remove_unless_locked(partial: Path) -> None:
    # Another process may be downloading another version, or the same one from a server that does not name versions.
    with contextlib.suppress(OSError), partial.open("rb") as file:  # Also if it is gone, or open elsewhere on Windows.
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.unlink()


def _bar(name: str, start: int, length: int | None, *, shown: bool) -> contextlib.AbstractContextManager[Any]:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        if shown:
            size = "" if length is None else f" ({length / 1e6:.1f} MB)"
            print(f"downloading {name}{size}", file=sys.stderr)
        return contextlib.nullcontext(SimpleNamespace(update=lambda n_bytes: None))
    return tqdm(desc=name, initial=start, total=length, unit="B", unit_scale=True, unit_divisor=1000, disable=not shown)
