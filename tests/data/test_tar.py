"""Members of tar archives by their headers, and archives that end early or are damaged."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path

import pytest

from dinov3.data.datasets.tar import BLOCK, BrokenTarError, TarMember, iter_files, open_tar, resolve_links

from .tars import cut_off, write_tar

LONG_NAME = "deep/" * 60 + "ü" * 40 + ".jpg"
MEMBERS = {"a.jpg": b"a" * 700, "dir/b.jpg": b"", LONG_NAME: b"c" * 10, "d.cls": b"d" * 512}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tgz"])
def test_names_offsets_and_sizes_are_tarfiles(suffix: str, format: str, tmp_path: Path) -> None:
    content = {name: data for name, data in MEMBERS.items() if format != "ustar" or name != LONG_NAME}
    mode = {".tar": "w", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}.get(suffix, "w:gz")
    path = write_tar(tmp_path / f"x{suffix}", content, mode=mode, format=FORMATS[format])
    with tarfile.open(path) as reference:
        expected = [(info.name, info.offset, info.offset_data, info.size) for info in reference]
    files = list(iter_files(path, wants_content=lambda name: name.endswith(".jpg")))
    assert [file[:4] for file in files] == expected
    assert [file.end for file in files[:-1]] == [file.start for file in files[1:]]
    assert [file.content for file in files[:-1]] == list(content.values())[:-1] and files[-1].content is None
    with open_tar(path) as archive:
        for file in files:
            archive.seek(file.data)
            assert archive.read(file.size) == content[file.name]


def test_directories_are_left_out_and_links_take_no_data(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, type in (("dir", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("file", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type = type
            info.linkname = "file"
            tar.addfile(info)
    assert [(file.name, file.start, file.size, file.target) for file in iter_files(path)] == [
        ("link", 512, 0, "file"),
        ("file", 1024, 0, None),
    ]


def test_links_that_lead_to_each_other_lead_to_nothing() -> None:
    def link(name: str, target: str) -> TarMember:
        return TarMember(name, 0, 512, 0, 512, None, target)

    file = TarMember("./x", 0, 512, 7, 1024, b"content")
    members = [link("a", "b"), link("b", "a"), link("c", "d"), link("d", "x"), file]
    resolved = resolve_links(members)
    assert [(member.name, member.content) for member in resolved] == [
        ("a", None), ("b", None), ("c", b"content"), ("d", b"content"), ("./x", b"content"),
    ]  # fmt: skip
    assert [member.target for member in resolved] == ["b", "a", None, None, None]


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_of_an_archive_cut_off_anywhere_the_whole_members_are_found_and_the_byte_is_named(
    format: str, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "x.tar", MEMBERS, format=FORMATS[format])
    whole, data = list(iter_files(path)), path.read_bytes()
    for size in range(whole[-1].end, -1, -128):
        cut_off(path, size)
        found = []
        with pytest.raises(BrokenTarError, match=rf"x\.tar ends early, at byte {size}: "):
            for file in iter_files(path):
                found.append(file)
        assert found == [member for member in whole if member.end <= size], size
        path.write_bytes(data)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_a_compressed_archive_that_is_cut_off_is_named(suffix: str, tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(40_000)
    path = write_tar(tmp_path / f"x.tar.{suffix}", {"a.jpg": noise, "b.jpg": noise[::-1]}, mode=f"w:{suffix}")
    cut_off(path, path.stat().st_size * 3 // 4)
    found = []
    with pytest.raises(BrokenTarError, match=rf"x\.tar\.{suffix} ends early or is damaged, at"):
        for file in iter_files(path):
            found.append(file.name)
    assert found in (["a.jpg"], [])  # a decompressor may stop a block before the cut


def test_one_block_of_zeros_ends_an_archive(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a": b"1"})
    assert len(list(iter_files(cut_off(path, 3 * BLOCK)))) == 1


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a": b"1", "b": b"2"})
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(BrokenTarError, match=r"x\.tar is damaged \(bad checksum\), at byte 1024"):
        list(iter_files(path))


def test_what_is_no_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(BrokenTarError, match=r"x\.tar is damaged .*at byte 0"):
        list(iter_files(path))
