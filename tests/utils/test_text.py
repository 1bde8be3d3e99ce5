"""Text of any system, names that are not UTF-8, and terminals that cannot show them."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path

import pytest

from dinov3.data.datasets import BadImageError, ImageFolder
from dinov3.data.datasets.ade20k import ADE20K
from dinov3.eval.features.cache import describe_images
from dinov3.logging import cleanup_logging, setup_logging
from dinov3.utils.command_line import run_command_line
from dinov3.utils.files import atomic_write
from dinov3.utils.text import read_lines, read_text
from tests.data.tars import png

OLD_NAME = os.fsdecode(b"caf\xe9.png")  # Latin-1, as from an old zip archive


@pytest.mark.parametrize(
    "data",
    [
        "é,1\nb\n".encode(),
        "é,1\r\nb\r\n".encode(),
        "é,1\rb".encode(),
        "é,1\nb".encode("utf-8-sig"),
        "é,1\r\nb\r\n".encode("utf-16"),
        b"\xfe\xff" + "é,1\r\nb\r\n".encode("utf-16-be"),
    ],
)
def test_lines_are_the_same_however_they_were_saved(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(data)
    assert read_lines(tmp_path / "list.txt") == ["é,1", "b"]


def test_lines_end_only_where_lines_end_and_an_empty_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("a\x0bb\u2028c\x85d\n\n e \n".encode())
    assert read_lines(path) == ["a\x0bb\u2028c\x85d", "", " e "]
    path.write_bytes(b"")
    assert read_lines(path) == []


def test_names_that_are_not_utf_8_stay_the_names_of_their_files(tmp_path: Path) -> None:
    (tmp_path / OLD_NAME).write_bytes(b"content")
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.png\n")
    (name,) = read_lines(tmp_path / "list.txt")
    assert Path(tmp_path, name).read_bytes() == b"content"


def test_a_listing_keeps_names_that_are_not_utf_8(tmp_path: Path) -> None:
    for directory in ("images/training", "annotations/training"):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / OLD_NAME).write_bytes(png(7))
    ADE20K.dump_listing(ADE20K.Split.TRAIN, str(tmp_path))
    listing = tmp_path / "ADE20K_object150_train.txt"
    assert listing.read_bytes() == b"training/caf\xe9.png\n"
    listing.write_bytes(b"\xef\xbb\xbftraining/caf\xe9.png\r\n")
    assert ADE20K(ADE20K.Split.TRAIN, str(tmp_path))[0][0].getpixel((0, 0)) == (7, 7, 7)


def test_other_files_escape_what_utf_8_does_not_have(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "out.csv", "w") as file:
        file.write(OLD_NAME)
    assert read_text(tmp_path / "out.csv") == "caf\\udce9.png"


def test_features_of_images_with_such_names_are_stored(tmp_path: Path) -> None:
    (tmp_path / OLD_NAME).write_bytes(png(1))
    description = describe_images(ImageFolder(root=str(tmp_path)))
    assert description is not None and description["count"] == 1


def use_ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """Return what a terminal that knows only ASCII gets."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii", write_through=True))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(out, encoding="ascii", write_through=True))
    return out


def test_a_bad_image_is_named_in_log_and_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_terminal = use_ascii_terminal(monkeypatch)
    (tmp_path / "ü").mkdir()
    (tmp_path / "ü" / OLD_NAME).write_bytes(b"broken")
    with pytest.raises(BadImageError) as caught:
        ImageFolder(root=str(tmp_path))[0]
    setup_logging(tmp_path / "log.txt")
    logging.getLogger().error("%s", caught.value)
    cleanup_logging()
    name = b"\\xfc/caf\\udce9.png: UnidentifiedImageError"
    assert name in ascii_terminal.getvalue() and b"Logging error" not in ascii_terminal.getvalue()
    assert "ü/caf\\udce9.png: UnidentifiedImageError" in (tmp_path / "log.txt").read_text("utf-8")

    def main() -> None:
        print(f"reading {tmp_path}/ü")
        raise caught.value

    with pytest.raises(SystemExit) as ended:
        run_command_line(main)
    assert ended.value.code == 1
    assert ascii_terminal.getvalue().count(name) == 2 and b"reading" in ascii_terminal.getvalue()
