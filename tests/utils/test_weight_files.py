"""What is read from a file, and what is said about a file that cannot be read."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov3.utils import weight_files
from dinov3.utils.weight_files import (
    WeightsError,
    read_file,
    read_safetensors_header,
    should_map,
    write_safetensors,
)

STATE = {"cls_token": torch.randn(1, 1, 8), "blocks.0.attn.backbone.weight": torch.randn(300, 8)}


def assert_holds_state(state: Mapping[str, Tensor]) -> None:
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights"])
def test_format_is_recognised_by_content_and_not_by_name(name: str, tmp_path: Path) -> None:
    save_file(STATE, tmp_path / name)
    assert_holds_state(read_file(tmp_path / name))
    torch.save(STATE, tmp_path / name)
    assert_holds_state(read_file(tmp_path / name))
    torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=False)
    assert_holds_state(read_file(tmp_path / name))


def is_in_memory_maps(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
@pytest.mark.parametrize("save", [torch.save, save_file])
@pytest.mark.parametrize(
    ("limit", "mmap", "expected"), [(None, None, False), (100, None, True), (100, False, False), (None, True, True)]
)
def test_large_files_are_mapped_unless_the_caller_decides(
    save: Any,
    limit: int | None,
    mmap: bool | None,
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if limit is not None:
        monkeypatch.setattr(weight_files, "MAPPED_ABOVE", limit)
    save(STATE, tmp_path / "weights")
    found = read_file(tmp_path / "weights", mmap=mmap)
    assert is_in_memory_maps(tmp_path / "weights") is expected
    assert_holds_state(found)


def test_up_to_4_gib_are_read(tmp_path: Path) -> None:
    for name, size in {"large": 2**32 + 1, "small": 2**32}.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)  # takes no space
    assert should_map(tmp_path / "large") and not should_map(tmp_path / "small")
    assert should_map(tmp_path / "small", tmp_path / "small")


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_a_file_that_was_read_can_be_written_over(save: Any, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save(STATE, path)
    found = read_file(path)
    path.write_bytes(bytes(path.stat().st_size))  # as another file copied over it
    assert_holds_state(found)
    path.write_bytes(b"")
    save(dict(found), path)
    assert_holds_state(read_file(path))


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_tensors_are_on_the_cpu_whatever_the_default_device(save: Any, mmap: bool, tmp_path: Path) -> None:
    state = {**STATE, "empty": torch.empty(0, 3)}
    save(state, tmp_path / "weights")
    with torch.device("meta"):
        found = read_file(tmp_path / "weights", mmap=mmap)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_each_tensor_that_is_read_has_memory_of_its_own(save: Any, tmp_path: Path) -> None:
    save(STATE, tmp_path / "weights")
    for tensor in read_file(tmp_path / "weights").values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.data_ptr() % 16 == 0


def zip_checkpoint(content: Any = STATE) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def legacy_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save(STATE, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def safetensors_checkpoint() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(400)


def numpy_archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def picture() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    return buffer.getvalue()


BAD_FILES = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "one byte": (b"P", "is not a checkpoint: it is text: 'P'"),
    "truncated zip": (zip_checkpoint()[:2000], "is truncated: a zip archive of 2000 bytes without its end"),
    "truncated legacy": (legacy_checkpoint()[:3000], "damaged or truncated: unexpected EOF"),
    "truncated legacy pickle": (legacy_checkpoint()[:100], "is truncated: it ends in the middle"),
    "truncated safetensors": (
        safetensors_checkpoint()[:200],
        "is a truncated safetensors file: its header promises 400 bytes of data, but there are",
    ),
    "truncated safetensors header": (
        safetensors_checkpoint()[:20],
        "a truncated safetensors file: its header should have 65 bytes",
    ),
    "web page": (
        b"\n<!DOCTYPE html><html><title>Log in</title>",
        "a web page or an XML .* '<!DOCTYPE html><html>.* fetch",
    ),
    "text": (b"some notes\non weights", "it is text: 'some notes on weights'; expected what torch.save or"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc", "a git-lfs pointer .* git lfs pull"),
    "picture": (picture(), "is not a checkpoint: it is a PNG picture"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(50), r"it is a gzip archive \(unpack it first\)"),
    "bytes": (b"\x00\x01\x02\x03" * 20, "it begins with the bytes 00 01 02 03 00 01 02 03"),
    "list": (zip_checkpoint([torch.ones(1)]), "is not a checkpoint: it holds a list, expected a state dict"),
    "another zip": (numpy_archive(), "is not a PyTorch checkpoint, or is damaged or truncated"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_unreadable_file_is_named_and_described(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_file(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def safetensors_with(*entries: dict[str, Any] | str, n_bytes: int = 16, **more: Any) -> bytes:
    header = dict(zip("abc", entries, strict=False)) | more
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(n_bytes)


def entry(begin: int, end: int, dtype: str = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED_HEADERS = {
    "size": (
        safetensors_with(entry(0, 16)),
        r"damaged safetensors header: 'a' is F32 of shape \[2\], which takes 8 bytes, but .* \(0 to 16\) has 16",
    ),
    "huge": (
        safetensors_with(entry(0, 8, shape=[2**40, 2**40])),
        "damaged safetensors header: 'a' is F32 of shape",
    ),
    "overlap": (safetensors_with(entry(0, 8), entry(4, 12)), "'b' begins at byte 4 .* before it ends at byte 8"),
    "gap": (safetensors_with(entry(0, 8), entry(12, 20)), "'b' begins at byte 12 .* before it ends at byte 8"),
    "beyond": (safetensors_with(entry(0, 8), entry(8, 16), n_bytes=12), "promises 16 bytes of data, but there are 12"),
    "too much": (safetensors_with(entry(0, 8)), "promises 8 bytes of data, but there are 16"),
    "negative": (
        safetensors_with(entry(0, -8, shape=[-2])),
        "damaged safetensors header: 'a' needs a dtype, a shape and its first",
    ),
    "text": (safetensors_with(entry(0, 8, shape="2")), "damaged safetensors header: 'a' needs a dtype"),
    "fraction": (safetensors_with(entry(0, 8, shape=[2.0])), "damaged safetensors header: 'a' needs a dtype"),
    "incomplete": (
        safetensors_with({"dtype": "F32"}),
        r"damaged safetensors header: 'a' .* but has \{'dtype': 'F32'\}",
    ),
    "no entry": (safetensors_with("a"), "damaged safetensors header: 'a' needs a dtype"),
    "unknown dtype": (safetensors_with(entry(0, 8, "F4")), "an unknown type: 'a' is F4, expected one of F64, F32"),
    "unhashable dtype": (safetensors_with(entry(0, 8, ["F32"])), "damaged safetensors header: 'a' needs a dtype"),  # type: ignore[arg-type]
    "metadata": (safetensors_with(entry(0, 16, shape=[4]), __metadata__=[1]), "its header cannot be read"),
    "no JSON": (struct.pack("<Q", 9) + b'{"a": 1,}' + bytes(9), "its header cannot be read"),
    "nested": (struct.pack("<Q", 200_005) + b'{"a":' + b"[" * 200_000, "its header cannot be read"),
    "length": (struct.pack("<Q", 2**31) + b"{}", r"its header should have 2147483648 bytes, but the whole file has 10"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED_HEADERS.values(), ids=DAMAGED_HEADERS)
def test_damaged_header_of_safetensors(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_file(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("mmap", [False, True])
def test_every_kind_of_tensor_in_safetensors(mmap: bool, tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8)
    tensors = {str(kind): torch.arange(3).to(kind) for kind in (*kinds, torch.bool)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 5), "matrix": torch.randn(2, 3)}
    save_file(tensors, tmp_path / "theirs")
    write_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    for found in (
        read_file(tmp_path / "theirs", mmap=mmap),
        read_file(tmp_path / "ours", mmap=mmap),
        load_file(tmp_path / "ours"),
    ):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert torch.equal(found[name].double(), tensor.double()), name
    assert read_safetensors_header(tmp_path / "ours").metadata == {"format": "pt"}


def test_tensors_at_odd_places_of_safetensors_are_moved(tmp_path: Path) -> None:
    content = safetensors_with(entry(0, 1, "U8", [1]), entry(1, 9), n_bytes=0)
    (tmp_path / "odd").write_bytes(content + b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes())
    for mmap in (False, True):
        found = read_file(tmp_path / "odd", mmap=mmap)
        assert found["a"].tolist() == [7] and found["b"].tolist() == [1.5, -2.0]
        assert found["b"].data_ptr() % 4 == 0


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(zipped: bool, tmp_path: Path) -> None:
    torch.save(STATE | {"trap": Trap(tmp_path / "sprung")}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"other than tensors, numbers and text \(such as \S+\.mkdir\)"):
        read_file(tmp_path / "w.pth")
    assert not (tmp_path / "sprung").exists()
