"""Reading every image of a dataset once: what is counted, listed, resumed and refused."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dinov3.data import make_dataset
from dinov3.data.check import check_dataset, main
from dinov3.utils.command_line import run_command_line

from .tars import png, write_tar


def jpeg(size: tuple[int, int], mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images, of which two repeat others, one is cut off and one is text; one name is not UTF-8."""
    root = tmp_path / "photos"
    root.mkdir()
    whole = jpeg((40, 30))
    files = {"1.jpg": whole, "2.jpg": jpeg((20, 50), "L"), "3.png": png(1), "cut.jpg": whole[:-200], "text.jpg": b"hi"}
    for name, data in {**files, "4.png": png(1), os.fsdecode(b"\xe9.jpg"): whole}.items():
        (root / name).write_bytes(data)
    return root


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_everything_is_counted_and_bad_images_are_listed(num_workers: int, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = check_dataset(f"ImageFolder:root={photos}", out, decode=True, num_workers=num_workers)
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["images"] == 7 and summary["bytes"] == sum(path.stat().st_size for path in photos.iterdir())
    assert summary["modes"] == {"RGB": 4, "L": 1}
    assert summary["common_sizes"] == {"40x30": 2, "6x5": 2, "20x50": 1}
    assert summary["sides"] == {"smallest": 5, "median": 20, "largest": 30}
    assert summary["duplicates"]["images"] == 2 and summary["unreadable"]["images"] == 2
    assert summary["unreadable"]["examples"][1] == "text.jpg: not an image: 2 bytes that begin with b'hi'"
    assert lines(out / "skip.txt") == [b"cut.jpg", b"text.jpg"]
    assert lines(out / "duplicates.txt") == [b"4.png\t3.png", b"\xe9.jpg\t1.jpg"]


def test_the_list_is_what_datasets_skip(photos: Path, tmp_path: Path) -> None:
    string = f"ImageFolder:root={photos}"
    check_dataset(string, tmp_path / "out", decode=True, num_workers=0, skip_duplicates=True)
    dataset = make_dataset(dataset_str=f"{string}:skip={tmp_path}/out/skip.txt")
    assert [dataset.get_image_relpath(index) for index in range(len(dataset))] == ["1.jpg", "2.jpg", "3.png"]


def test_headers_do_not_show_damaged_pixels(photos: Path, tmp_path: Path) -> None:
    summary = check_dataset(f"ImageFolder:root={photos}", tmp_path / "out", num_workers=0)
    assert summary["unreadable"]["images"] == 1 and lines(tmp_path / "out" / "skip.txt") == [b"text.jpg"]


def test_maps_are_read_with_their_images(tmp_path: Path) -> None:
    for number, size in enumerate([(6, 5), (5, 6)]):
        for directory, mode in (("images", "RGB"), ("labels", "L")):
            (tmp_path / directory).mkdir(exist_ok=True)
            image = Image.new(mode, (6, 5) if directory == "images" else size)
            image.save(tmp_path / directory / f"{number}.png")
    summary = check_dataset(f"SegmentationFolder:root={tmp_path}", tmp_path / "out", decode=True, num_workers=0)
    assert summary["unreadable"]["images"] == 1 and "must have the same size" in summary["unreadable"]["examples"][0]


def test_compressed_shards_are_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar.gz", {"1.png": png(1), "2.png": b"no", "3.png": png(1)}, mode="w:gz")
    summary = check_dataset(f"WebDataset:urls={tmp_path}/a.tar.gz:mode=stream", tmp_path / "out", num_workers=0)
    assert lines(tmp_path / "out" / "skip.txt") == [b"a.tar.gz/2.png"] and summary["duplicates"]["images"] == 1


def test_a_killed_check_is_continued(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    string, whole, killed = f"ImageFolder:root={photos}", tmp_path / "whole", tmp_path / "killed"
    expected = check_dataset(string, whole, num_workers=0)
    records = (whole / "records.jsonl").read_text().splitlines(keepends=True)
    killed.mkdir()
    (killed / "records.jsonl").write_text("".join(records[:3]) + records[3][:20])
    read: list[int] = []
    original = type(make_dataset(dataset_str=string)).get_image_data
    monkeypatch.setattr(
        "dinov3.data.datasets.ImageFolder.get_image_data",
        lambda self, index: read.append(index) or original(self, index),  # type: ignore[func-returns-value]
    )
    assert check_dataset(string, killed, num_workers=0) == expected
    assert read == [2, 3, 4, 5, 6]
    assert (killed / "records.jsonl").read_text() == (whole / "records.jsonl").read_text()
    assert check_dataset(string, killed, num_workers=0) == expected and read == [2, 3, 4, 5, 6]


def test_another_check_is_not_continued(photos: Path, tmp_path: Path) -> None:
    string, out = f"ImageFolder:root={photos}", tmp_path / "out"
    check_dataset(string, out, num_workers=0)
    with pytest.raises(FileExistsError, match=r"decode: False before, True now\): choose another --output-dir"):
        check_dataset(string, out, decode=True, num_workers=0)
    (photos / "new.png").write_bytes(png(3))
    with pytest.raises(FileExistsError, match="data: "):
        check_dataset(string, out, num_workers=0)
    assert check_dataset(string, out, decode=True, num_workers=0, overwrite=True)["images"] == 8


def test_the_command_reports_and_exits_by_what_it_found(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    string = f"ImageFolder:root={photos}"
    with pytest.raises(SystemExit) as ended:
        run_command_line(lambda: main([string, "--decode", "--num-workers", "0"]))
    assert ended.value.code == 3
    out = capsys.readouterr().out
    assert "7 images" in out and "modes: RGB 4, L 1" in out and "40x30 2" in out
    assert "cannot be read (decoded): 2\n  cut.jpg: " in out
    assert "leave 2 images out with skip=data-check/skip.txt" in out
    main([f"{string}:skip=data-check/skip.txt", "--decode", "--num-workers", "0", "--output-dir", "again"])
    assert "cannot be read (decoded): 0" in capsys.readouterr().out
