"""From `weights=` to a local file: paths, and downloads from a server that fails in every way."""

from __future__ import annotations

import hashlib
import http.client
import re
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch

from dinov3.eval.command.model import ModelConfig, load_model
from dinov3.hub import classifiers, depthers, downloads
from dinov3.hub.architectures import PUBLISHED
from dinov3.hub.backbones import Weights, dinov3_vits16, url_of
from dinov3.hub.convert import convert
from dinov3.hub.from_checkpoint import dinov3_from_checkpoint
from dinov3.hub.sources import locate, read_weights
from dinov3.utils.weight_files import WeightsError, read_file


class Server(ThreadingHTTPServer):
    """Serves `content` at every path whose status is 200; `drops` says after how many bytes each connection breaks."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content(0)
        self.statuses: list[int] = []
        self.drops: list[int] = []
        self.etag: str | None = '"one"'
        self.continues = True
        self.has_length = True
        self.content_type = "application/octet-stream"
        self.requests: list[tuple[str, str | None]] = []

    def url(self, name: str = "w-0a1b2c3d.pth") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        status = server.statuses.pop(0) if server.statuses else 200
        if status != 200:
            self.send_error(status)
            return
        start = 0
        if asked and server.continues and self.headers.get("If-Range") == server.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.has_length:
            self.send_header("Content-Length", str(len(body)))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Type", server.content_type)
        self.end_headers()
        self.wfile.write(body[: server.drops.pop(0)] if server.drops else body)

    def log_message(self, *args: Any) -> None:
        pass


def content(seed: int, size: int = 20_000) -> bytes:
    buffer = BytesIO()
    torch.save({"cls_token": torch.rand(size, generator=torch.Generator().manual_seed(seed))}, buffer)
    return buffer.getvalue()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of downloads; connections break into small pieces, and nobody waits between attempts."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(downloads, "CHUNK", 1000)
    monkeypatch.setattr(downloads, "WAITS", (0.0, 0.0, 0.0))
    return tmp_path / "hub" / "checkpoints"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []


def test_file_whose_name_ends_in_a_hash_is_downloaded_once_under_this_name(server: Server, cache: Path) -> None:
    path = locate(server.url("a/b/w-0a1b2c3d.pth") + "?Signature=a/b.c&Policy=d", progress=False)
    assert path == cache / "w-0a1b2c3d.pth" and path.read_bytes() == server.content
    assert locate(server.url("w-0a1b2c3d.pth") + "?Signature=other") == path
    assert server.requests == [("/a/b/w-0a1b2c3d.pth?Signature=a/b.c&Policy=d", None)]
    assert names(cache) == ["w-0a1b2c3d.pth"]


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint-00010000.pth", "dino-cafe.pth"])
def test_files_of_equal_names_at_different_urls_are_different(name: str, server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / name).write_bytes(content(2))  # left by an earlier version, which forgot where it came from
    web = locate(server.url(f"web/resolve/main/{name}?Signature=one"), progress=False)
    expected, server.content = server.content, content(1)
    satellite = locate(server.url(f"satellite/resolve/main/{name}"), progress=False)
    assert web.read_bytes() == expected and satellite.read_bytes() == content(1)
    assert web.suffix == satellite.suffix == Path(name).suffix and web.stem.startswith(Path(name).stem)
    assert locate(server.url(f"web/resolve/main/{name}?Signature=two#x")) == web and len(server.requests) == 2


def test_the_query_selects_the_file_where_the_path_does_not_name_one(server: Server, cache: Path) -> None:
    first = locate(server.url("download?id=1"), progress=False)
    server.content = content(1)
    assert locate(server.url("download?id=2"), progress=False).read_bytes() == content(1) != first.read_bytes()


def test_published_files_keep_their_names(server: Server, cache: Path) -> None:
    urls = [url_of(entry, Weights[data]) for entry, model in PUBLISHED.items() for data in model.hashes]
    urls += [head.url() for head in (classifiers.PUBLISHED, depthers.SYNTHMIX, depthers.CHMV2)]
    for url in urls:
        name = url.rpartition("/")[2]
        assert locate(server.url(name), progress=False) == cache / name


def test_errors_about_a_cached_file_name_its_url(server: Server, cache: Path) -> None:
    url = server.url("a/model.safetensors")
    signed = f"{url.replace('//', '//user:secret@')}?Signature=secret"
    path = locate(url, progress=False)

    def fail(found: Path) -> None:
        raise WeightsError(f"{found} is empty")

    pattern = re.escape(f"{path} is empty ({path} was downloaded from {url}: delete it to download it again)")
    with pytest.raises(WeightsError, match=f"^{pattern}$"):
        read_weights(signed, fail)
    assert read_weights(signed, lambda found: found.name) == (path.name, f"{path} (downloaded from {url})")
    with pytest.raises(WeightsError, match=f"^{path} is empty$"):
        read_weights(path, fail)


@pytest.mark.parametrize(
    "load",
    [
        lambda url: dinov3_vits16(weights=url),
        lambda url: dinov3_from_checkpoint(url),
        lambda url: convert(url, Path(torch.hub.get_dir()).parent / "out.pth", to="release"),
        lambda url: load_model(ModelConfig(pretrained_weights=url)),
        lambda url: load_model(ModelConfig(dino_hub="dinov3_vits16", weights=url)),
    ],
    ids=["hub", "checkpoint", "convert", "evaluation", "evaluation of a hub model"],
)
def test_everyone_who_reads_a_download_names_it_in_errors(
    load: Callable[[str], Any], server: Server, cache: Path
) -> None:
    url = server.url("a/model.pth")
    with pytest.raises(WeightsError, match="does not") as caught:
        load(url + "?Signature=secret")
    [name] = names(cache)
    assert url in str(caught.value) and str(cache / name) in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("drops", [[30_000], [10_000, 0, 0, 20_000, 0, 5000]])
def test_broken_connection_is_continued(server: Server, drops: list[int]) -> None:
    server.drops = list(drops)
    assert locate(server.url(), progress=False).read_bytes() == server.content
    assert server.requests[1] == ("/w-0a1b2c3d.pth", f"bytes={drops[0]}-")
    assert len(server.requests) == 1 + len(drops)


def test_server_that_fails_for_a_while_is_asked_again(server: Server) -> None:
    server.drops, server.statuses = [30_000], [200, 503, 429]
    assert locate(server.url(), progress=False).read_bytes() == server.content
    assert [asked for _, asked in server.requests] == [None, *["bytes=30000-"] * 3]


def test_next_call_continues_where_the_connection_kept_breaking(server: Server, cache: Path) -> None:
    server.drops = [30_000, 0, 0, 0]
    with pytest.raises(ConnectionError, match=r"the connection was closed too early; 4 attempts in a row"):
        locate(server.url(), progress=False)
    (left,) = names(cache)
    assert left.endswith(".partial") and (cache / left).read_bytes() == server.content[:30_000]
    path = locate(server.url() + "?Signature=new", progress=False)
    assert path.read_bytes() == server.content and names(cache) == ["w-0a1b2c3d.pth"]
    assert server.requests[-1] == ("/w-0a1b2c3d.pth?Signature=new", "bytes=30000-")


def test_another_version_of_the_file_is_not_mixed_with_the_first_part_of_this_one(server: Server, cache: Path) -> None:
    server.drops = [30_000, 0, 0, 0]
    with pytest.raises(ConnectionError):
        locate(server.url(), progress=False)
    server.content, server.etag = content(1), '"two"'
    assert locate(server.url(), progress=False).read_bytes() == server.content
    assert names(cache) == ["w-0a1b2c3d.pth"]


def test_file_that_changes_while_it_arrives_starts_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.drops = [30_000]
    append = downloads._append

    def append_and_change(*args: Any) -> None:
        try:
            append(*args)
        finally:
            server.content, server.etag = content(1), '"two"'

    monkeypatch.setattr(downloads, "_append", append_and_change)
    assert locate(server.url(), progress=False).read_bytes() == content(1)


@pytest.mark.parametrize("kind", ["no ranges", "no version", "weak version"])
def test_server_that_cannot_continue_sends_it_all_again(server: Server, cache: Path, kind: str) -> None:
    server.continues = kind != "no ranges"
    server.etag = {"no version": None, "weak version": 'W/"one"'}.get(kind, server.etag)
    server.drops = [30_000, 10_000]
    assert locate(server.url(), progress=False).read_bytes() == server.content
    assert names(cache) == ["w-0a1b2c3d.pth"]


def test_nothing_is_kept_that_could_not_be_continued(server: Server, cache: Path) -> None:
    server.etag, server.drops = None, [30_000, 20_000, 20_000, 20_000]
    with pytest.raises(ConnectionError):
        locate(server.url(), progress=False)
    assert names(cache) == []


def test_length_may_be_unknown(server: Server) -> None:
    server.has_length = False
    assert locate(server.url(), progress=False).read_bytes() == server.content
    server.drops = [30_000]
    with pytest.raises(WeightsError, match="what the server sent is truncated"):
        locate(server.url("other.pth"), progress=False)


def test_complete_file_under_its_temporary_name_is_taken(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dinov3.hub.sources.read_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            locate(server.url(), progress=False)
    assert len(names(cache)) == 1
    assert locate(server.url(), progress=False).read_bytes() == server.content
    assert [asked for _, asked in server.requests] == [None, None]


@pytest.mark.parametrize("etag", ['"one"', None])
def test_simultaneous_downloads_all_find_the_file(server: Server, cache: Path, etag: str | None) -> None:
    server.content, server.etag = content(0, size=100_000), etag
    barrier, found = Barrier(4), []

    def work() -> None:
        barrier.wait()
        path = locate(server.url(), progress=False)
        found.append(
            (path, torch.equal(read_file(path)["cls_token"], torch.load(BytesIO(server.content))["cls_token"]))
        )

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(cache / "w-0a1b2c3d.pth", True)] * 4
    assert names(cache) == ["w-0a1b2c3d.pth"]


def test_a_file_that_vanishes_while_it_is_locked_is_made_again(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, locked = downloads.fcntl.flock, []

    def lose_the_first(file: Any, operation: int) -> None:
        lock(file, operation)
        if not locked:
            Path(file.name).unlink()
        locked.append(file.name)

    monkeypatch.setattr(downloads.fcntl, "flock", lose_the_first)
    assert locate(server.url(), progress=False).read_bytes() == server.content
    assert len(locked) == 2 and names(cache) == ["w-0a1b2c3d.pth"]


def test_a_download_leaves_those_of_others_alone(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    others, left_over = cache / "w-0a1b2c3d.pth.abc.partial", cache / "w-0a1b2c3d.pth.def.partial"
    left_over.touch()
    with downloads._locked(others):
        locate(server.url(), progress=False)
        assert names(cache) == ["w-0a1b2c3d.pth", others.name]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<!DOCTYPE html><html>Please log in</html>", "it is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "it is a web page or an XML error message"),
        (b"", r"what the server sent is empty \(0 bytes\)"),
        (content(0)[:5000], "is truncated: a zip archive of 5000 bytes"),
    ],
)
def test_a_download_that_is_not_weights_is_deleted(server: Server, cache: Path, body: bytes, reason: str) -> None:
    server.content = body
    url = server.url("w-01234567.pth") + "?Signature=secret"
    for check_hash in (False, True):
        with pytest.raises(WeightsError, match=f"w-01234567.pth did not return usable weights: .*{reason}") as caught:
            locate(url, check_hash=check_hash, progress=False)
        message = str(caught.value)
        assert "accept their license" in message and "pass weights=PATH" in message
        assert "secret" not in message and "\n" not in message and ".partial" not in message
    assert names(cache) == []


def test_hash_of_a_download_and_of_the_cached_file(server: Server, cache: Path) -> None:
    good = hashlib.sha256(server.content).hexdigest()[:8]
    path = locate(server.url(f"w-{good}.pth"), check_hash=True, progress=False)
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(WeightsError, match=f"does not match the hash in its name: .* not with {good}"):
        locate(server.url(f"w-{good}.pth"), check_hash=True, progress=False)
    with pytest.raises(WeightsError, match="what the server sent does not match the hash in its name"):
        locate(server.url("v-01234567.pth"), check_hash=True, progress=False)
    asked = len(server.requests)
    with pytest.raises(ValueError, match=r"check_hash=True, but the name of w.pth does not end in -<hash>.pth"):
        locate(server.url("w.pth"), check_hash=True)
    assert names(cache) == [path.name] and len(server.requests) == asked


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusal_says_what_to_do_without_the_signature(server: Server, cache: Path, status: int) -> None:
    server.statuses = [status]
    with pytest.raises(ConnectionError, match=rf"/none.pth: HTTP {status} .* gated: .* pass weights=PATH") as caught:
        locate(server.url("none.pth") + "?Signature=secret", progress=False)
    assert "secret" not in str(caught.value) and len(server.requests) == 1
    assert names(cache) == []


def test_server_that_is_not_there(server: Server) -> None:
    url = server.url() + "?Signature=secret"
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match=r"could not download \S+.pth: .*refused.*Check the network") as caught:
        locate(url)
    assert "secret" not in str(caught.value)


def test_invalid_urls(server: Server) -> None:
    with pytest.raises(ValueError, match="the URL does not name a file"):
        locate(server.url("a/?Signature=secret"))
    with pytest.raises(ValueError, match="the URL contains a space") as caught:
        locate(server.url("w-0a1b2c3d.pth?Signature=se cret"))
    assert "cret" not in str(caught.value)
    with pytest.raises(ValueError, match="weights='s3://b/w.pth': cannot read s3:// URLs"):
        locate("s3://b/w.pth")


def test_disk_that_is_too_small_is_noticed_at_once(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage(free=1000))
    with pytest.raises(OSError, match=r"only 0.0 GB are free there: make room, or set .* TORCH_HOME"):
        locate(server.url(), progress=False)
    assert names(cache) == []


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_progress(
    server: Server, has_tqdm: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not has_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    locate(server.url("silent.pth"), progress=False)
    assert capsys.readouterr().err == ""
    server.drops = [30_000]
    locate(server.url("shown.pth"))
    shown = capsys.readouterr().err
    assert "shown.pth" in shown and ("100%" in shown) is has_tqdm


def test_timeout_counts_as_a_broken_connection(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    read = http.client.HTTPResponse.read
    calls = iter([False, True])

    def slow(self: Any, *args: Any) -> bytes:
        if next(calls, False):
            raise TimeoutError("timed out")
        return read(self, *args)

    monkeypatch.setattr(http.client.HTTPResponse, "read", slow)
    assert locate(server.url(), progress=False).read_bytes() == server.content
    assert server.requests[1] == ("/w-0a1b2c3d.pth", "bytes=1000-")


def test_local_paths_are_used_where_they_lie(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "a b" / "w.pth"
    path.parent.mkdir()
    path.write_bytes(content(0))
    for weights in (path, str(path), path.as_uri(), "~/a b/w.pth", path.parent):
        assert locate(weights) == (path.parent if weights == path.parent else path)
    for weights in (tmp_path / "none.pth", "none/w.pth", "file:///none/w.pth"):
        with pytest.raises(FileNotFoundError, match=r"no weights at \S*\.pth: there is no such file or directory"):
            locate(weights)
    assert not cache.exists()
