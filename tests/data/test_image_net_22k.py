"""ImageNet-22k: one tar per class, read by offset from tars that stay open."""

from __future__ import annotations

import gzip
import os
import pickle
import subprocess
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from dinov3.data.datasets import BadImageError, ImageNet22k
from dinov3.data.datasets import dump as dump_module
from dinov3.data.datasets.files import OpenFiles

from .tars import cut_off, png, write_tar

LONG_NAME = "n2_" + "9" * 150 + ".JPEG"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_tar(
        tmp_path / "n1.tar", {"n1_1.JPEG": png(1), "n1_2.JPEG": gzip.compress(png(2))}, format=tarfile.USTAR_FORMAT
    )
    write_tar(tmp_path / "n2.tar", {"n2_3.JPEG": png(3), LONG_NAME: png(4), "n2_5.JPEG": png(5)})
    return tmp_path


def image_net_22k(root: Path, **kwargs: int) -> ImageNet22k:
    return ImageNet22k(root=str(root), extra=str(root / "extra"), **kwargs)


def dumped(root: Path, **kwargs: int) -> ImageNet22k:
    dataset = image_net_22k(root, **kwargs)
    dataset.dump_extra()
    return dataset


def grays(dataset: ImageNet22k) -> list[int]:
    return [dataset[index][0].getpixel((0, 0))[0] for index in range(len(dataset))]


def write_block_logs(root: Path, *class_ids: str) -> None:
    (root / "blocks").mkdir(exist_ok=True)
    for class_id in class_ids:
        log = subprocess.run(
            ["tar", "--list", "--block-number", "--file", root / f"{class_id}.tar"], capture_output=True, check=True
        )
        (root / "blocks" / f"{class_id}.log").write_bytes(log.stdout)


def test_images_targets_and_classes(root: Path) -> None:
    dataset = dumped(root)
    assert grays(dataset) == [1, 2, 3, 4, 5]
    assert dataset.get_targets().tolist() == [dataset[index][1] for index in range(5)] == [0, 0, 1, 1, 1]
    assert [dataset.get_class_id(index) for index in range(5)] == ["n1", "n1", "n2", "n2", "n2"]
    assert dataset.get_class_ids().tolist() == dataset.classes == ["n1", "n2"]
    assert dataset.find_class_id(1) == "n2"
    assert dataset.get_image_relpath(3) == f"n2.tar/{LONG_NAME}"


@pytest.mark.parametrize("format", ["ustar", "gnu", "pax"])
def test_block_logs_of_tar_give_the_same_images_as_the_headers(format: str, tmp_path: Path) -> None:
    names = ["n1_1.JPEG", "n1_2.JPEG", LONG_NAME, "n1_3.JPEG", "n1_4.JPEG"]
    content = {name: png(number) for number, name in enumerate(names) if format != "ustar" or name != LONG_NAME}
    kind = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}[format]
    write_tar(tmp_path / "n1.tar", content, format=kind)
    by_header = dumped(tmp_path)
    write_block_logs(tmp_path, "n1")
    by_log = dumped(tmp_path)
    for dataset in (by_header, by_log):
        assert [dataset.get_image_data(index) for index in range(len(dataset))] == list(content.values())
    if format == "ustar":
        assert np.array_equal(by_header._entries, by_log._entries)


def test_logs_and_headers_can_be_mixed_and_an_unreadable_published_file_is_left_out(root: Path) -> None:
    write_tar(root / "n06470073.tar", {"n06470073_47249.JPEG": b"x", "n06470073_1.JPEG": png(9)})
    write_block_logs(root, "n06470073", "n1")
    assert grays(dumped(root)) == [9, 1, 2, 3, 4, 5]


def test_hard_links_are_the_images_that_they_lead_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "n1.tar", {"n1_1.JPEG": png(1), "n1_2.JPEG": png(2)})
    with tarfile.open(path, "a") as tar:
        for name, target in (("n1_3.JPEG", "n1_1.JPEG"), ("n1_4.JPEG", "elsewhere.JPEG")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            tar.addfile(info)
    dataset = dumped(tmp_path)
    assert grays(dataset) == [1, 2, 1] and dataset.get_image_relpath(2) == "n1.tar/n1_3.JPEG"
    assert f"left out 1 links in {path} to what it does not have: n1_4.JPEG -> elsewhere.JPEG" in caplog.text


def test_extra_files_are_needed_only_when_they_are_read_and_the_advice_works(root: Path) -> None:
    dataset = image_net_22k(root)
    with pytest.raises(FileNotFoundError) as info:
        len(dataset)
    message = str(info.value)
    assert f"ImageNet22k: {root}/extra/entries.npy does not exist" in message
    assert f"python -m dinov3.data.datasets.dump 'ImageNet22k:root={root}:extra={root}/extra'" in message
    exec(message.splitlines()[-1].strip(), {"ImageNet22k": ImageNet22k})
    assert len(dataset) == 5


def test_the_command_writes_the_extra_files(root: Path) -> None:
    dump_module.main([f"ImageNet22k:root={root}:extra={root}/extra"])
    assert grays(image_net_22k(root)) == [1, 2, 3, 4, 5]


def test_offsets_beyond_four_gigabytes_are_wide(tmp_path: Path) -> None:
    path = tmp_path / "n1.tar"
    write_tar(path, {"n1_1.JPEG": png(1)})
    with tarfile.open(path, "a") as tar:
        hole = tarfile.TarInfo("hole.JPEG")
        hole.size = 2**32
        start = tar.offset
    with open(path, "r+b") as file:  # a file of 4 GiB of nothing, which takes no room on the disk
        file.seek(start)
        file.write(hole.tobuf(tarfile.GNU_FORMAT))
        file.seek(start + 512 + hole.size)
        file.write(tarfile.TarInfo("empty.JPEG").tobuf() + bytes(1024))
    dataset = dumped(tmp_path)
    assert [field[0].str for field in dataset._entries.dtype.fields.values()][2:4] == ["<u8", "<u8"]
    assert dataset.get_image_data(0) == png(1) and dataset.get_image_data(2) == b""


def open_tars() -> int:
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).endswith(".tar") for link in links if os.path.islink(link))


def test_tars_that_stay_open_are_few_and_are_closed(root: Path) -> None:
    for number in range(3, 9):
        write_tar(root / f"n{number}.tar", {"1.JPEG": png(number)})
    dataset = dumped(root, mmap_cache_size=2)
    assert len(grays(dataset)) == 11
    assert open_tars() == 2
    del dataset
    assert open_tars() == 0


def test_open_files_are_not_pickled_and_a_copy_reads(root: Path) -> None:
    dataset = dumped(root)
    grays(dataset)
    data = pickle.dumps(dataset)
    copy = pickle.loads(data)
    assert len(data) < 3000 and len(dataset._tars) == 2 and len(copy._tars) == 0
    assert grays(copy) == [1, 2, 3, 4, 5]


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_reads_on_with_what_is_open(root: Path) -> None:
    dataset = dumped(root)
    grays(dataset)
    child = os.fork()
    if child == 0:
        os._exit(0 if grays(dataset) == [1, 2, 3, 4, 5] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert grays(dataset) == [1, 2, 3, 4, 5]


def test_at_least_one_file_stays_open(root: Path) -> None:
    with pytest.raises(ValueError, match="at least one file must stay open, got 0"):
        image_net_22k(root, mmap_cache_size=0)


def test_open_files_read_only_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    files = OpenFiles(1)
    assert files.read(tmp_path / "a", 2, 3) == b"234"
    assert files.read(tmp_path / "a", 8, 5) == b"89"
    assert files.read(tmp_path / "a", 20, 5) == b""


def test_warnings_of_pillow_are_silenced(root: Path) -> None:
    class Warns:
        def __init__(self, data: bytes) -> None:
            pass

        def decode(self) -> str:
            warnings.warn("corrupt EXIF data", stacklevel=2)
            return "image"

    dataset = dumped(root)
    dataset.image_decoder = Warns  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dataset[0] == ("image", 0)


# What is missing or broken


def test_missing_parts_are_named(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ImageNet22k: root='.*nowhere' is not a directory"):
        image_net_22k(root / "nowhere")
    (root / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"ImageNet22k: no <class id>\.tar in .*/empty"):
        dumped(root / "empty")


def test_tars_without_files_are_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "n1.tar", {})
    with pytest.raises(FileNotFoundError, match=r"ImageNet22k: the 1 tars in .* hold no file"):
        dumped(tmp_path)


@pytest.mark.parametrize("with_log", [False, True], ids=["headers", "block log"])
def test_a_tar_that_ends_early_is_named_with_the_byte(with_log: bool, root: Path) -> None:
    if with_log:
        write_block_logs(root, "n2")
    cut_off(root / "n2.tar", 1500)
    with pytest.raises(ValueError, match=r"n2\.tar ends early, .*at byte 1500"):
        dumped(root)


def test_a_tar_that_is_cut_off_later_names_the_image(root: Path) -> None:
    dataset = dumped(root)
    cut_off(root / "n1.tar", 1100)
    with pytest.raises(
        BadImageError, match=r"cannot read image 1, .*n1\.tar/n1_2\.JPEG: .*n1\.tar ends early, at byte 1100"
    ):
        dataset[1]


def test_a_tar_that_is_not_the_one_that_was_listed_is_noticed(root: Path) -> None:
    dataset = dumped(root)
    write_tar(root / "n1.tar", {"n1_0.JPEG": bytes(range(256)) * 20})
    with pytest.raises(BadImageError, match=r"n1\.tar has no member at byte 1024: .*dump the extra files again"):
        dataset[1]


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("block 0: a\n", r"n1\.log ends early: its last line must be `block <number>: \*\* Block of NULs \*\*`"),
        ("", r"n1\.log ends early"),
        ("a\n", r"n1\.log: expected `block <number>: <member>`, found 'a'"),
    ],
)
def test_block_logs_that_are_not_such_are_named(log: str, message: str, root: Path) -> None:
    (root / "blocks").mkdir()
    (root / "blocks/n1.log").write_text(log)
    with pytest.raises(ValueError, match=message):
        dumped(root)
