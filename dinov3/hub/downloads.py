"""Large files from the network: complete, or not there at all.

Notable:
- What has arrived waits in `<name>.<digits that stand for the server's version of the file>.partial`, beside the file
  to be. A broken connection, or a later call, continues it; where the server cannot, or has another version by now, the
  download starts again.
- Of several processes that want the same file one downloads it, and the others wait for it.
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
from typing import Any, BinaryIO
from uuid import uuid4

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where two processes would both download.
    fcntl = None  # type: ignore[assignment]

TIMEOUT = 60.0  # seconds without a byte
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt, as long as none brings a byte
CHUNK = 2**20  # bytes

GATED = (
    "The published weights are gated: accept their license to get a signed URL (which expires after a while), and pass "
    "that as weights=, or fetch the file yourself and pass weights=PATH"
)


Response = http.client.HTTPResponse


class _BrokenConnection(Exception):
    pass


def download(url: str, path: Path, *, progress: bool, check: Callable[[Path], None]) -> None:
    """Fetch a file, unless it appears at `path` meanwhile.

    Args:
        url: http or https. Its query, which may be a signature, is kept out of messages.
        path: where the file goes, once it is complete and checked.
        progress: show a bar.
        check: is called with the complete file under its temporary name. What it raises goes through, and the file is
            removed.

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
    partial = path.with_name(f"{path.name}.{_version(response)}.partial")
    with response, _locked(partial):
        try:
            if path.exists():  # Another process was faster.
                return
            _fetch(url, response, partial, progress=progress)
            _check(partial, check)
            partial.replace(path)
        finally:
            if partial.exists() and (_validator(response) is None or partial.stat().st_size == 0):
                partial.unlink()  # It could not be continued.
    for other in path.parent.iterdir():
        if re.fullmatch(re.escape(path.name) + r"\.[0-9a-f]+\.partial", other.name):
            other.unlink(missing_ok=True)


def without_query(url: str) -> str:
    """A URL that can be shown: its query may be a signature that gives access."""
    return url.partition("?")[0]


def _check(partial: Path, check: Callable[[Path], None]) -> None:
    try:
        check(partial)
    except Exception:
        partial.unlink()
        raise


def _fetch(url: str, response: Response | None, partial: Path, *, progress: bool) -> None:
    assert response is not None
    length, validator = _length(response), _validator(response)
    with partial.open("ab") as file:
        if length is not None and file.tell() > length:
            _empty(file)
        start = most = file.tell()
        if start == length:
            return
        _check_disk(partial, start, length)
        if start > 0:
            response.close()
            response = None
        failures = 0
        with _bar(Path(partial.stem).stem, start, length, shown=progress) as bar:
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
                        raise ConnectionError(_describe_failure(url, partial, error, file.tell(), length)) from error
                    time.sleep(WAITS[failures - 1])


def _request_rest(url: str, file: BinaryIO, validator: str | None, bar: Any) -> Response:
    start = file.tell()
    if validator is not None:
        response = _request(url, {"Range": f"bytes={start}-", "If-Range": validator})
        if response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            return response
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            response.close()
            response = _request(url)
    else:
        response = _request(url)
    bar.update(-start)
    _empty(file)
    return response


def _request(url: str, headers: dict[str, str] | None = None) -> Response:
    headers = {"User-Agent": "dinov3", "Accept-Encoding": "identity"} | (headers or {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except http.client.InvalidURL:
        raise ValueError(f"weights={without_query(url)!r}: the URL holds a space, a line break or a bad port") from None
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


def _version(response: Response) -> str:
    validator = _validator(response)
    if validator is None:
        return uuid4().hex[:12]
    return hashlib.sha256(f"{validator} {_length(response)}".encode()).hexdigest()[:12]


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _check_disk(path: Path, start: int, length: int | None) -> None:
    free = shutil.disk_usage(path.parent).free
    if length is not None and length - start > free:
        raise OSError(
            errno.ENOSPC,
            f"{(length - start) / 1e9:.1f} GB are still to download into {path.parent}, but only {free / 1e9:.1f} GB "
            "are free there: make room, or let the environment variable TORCH_HOME name a directory on another disk",
        )


def _describe_failure(url: str, partial: Path, error: Exception, done: int, length: int | None) -> str:
    of_all = "" if length is None else f" of {length / 1e6:.1f}"
    return (
        f"could not download {without_query(url)}: {error}; {len(WAITS) + 1} attempts in a row brought nothing more. "
        f"{done / 1e6:.1f}{of_all} MB have arrived; if the server allows it, the next call goes on from there "
        f"({partial})"
    )


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    while True:
        with partial.open("ab") as file:
            with contextlib.suppress(OSError):  # Some network file systems have no locks.
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held the lock may have moved or removed the file.
            if partial.exists() and partial.stat().st_ino == os.fstat(file.fileno()).st_ino:
                yield
                return


class _NoBar:
    def update(self, n: int) -> None:
        pass


def _bar(name: str, start: int, length: int | None, *, shown: bool) -> contextlib.AbstractContextManager[Any]:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        if shown:
            size = "" if length is None else f" ({length / 1e6:.1f} MB)"
            print(f"downloading {name}{size}", file=sys.stderr)
        return contextlib.nullcontext(_NoBar())
    return tqdm(desc=name, initial=start, total=length, unit="B", unit_scale=True, unit_divisor=1000, disable=not shown)
