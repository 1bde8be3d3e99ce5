"""Images in tar shards: which are samples, the index, streams, and shards that end early."""

from __future__ import annotations

import io
import itertools
import logging
import os
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinov3.data import SamplerType, make_dataset
from dinov3.data.datasets import WebDataset, web_dataset
from dinov3.data.datasets import dump as dump_module
from dinov3.data.datasets.tar import BrokenTarError
from dinov3.data.datasets.web_dataset import expand_urls
from dinov3.data.loaders import make_train_data_loader

from .tars import cut_off, png, write_tar


def sample(number: int, *, label: bool = True) -> dict[str, bytes]:
    image = {f"{number:05d}.png": png(number)}
    return image | ({f"{number:05d}.cls": str(number % 3).encode()} if label else {})


def samples(numbers: range, *, label: bool = True) -> dict[str, bytes]:
    return {name: data for number in numbers for name, data in sample(number, label=label).items()}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of 4, 5 and 3 images; image i is gray i and its label i mod 3."""
    for number, numbers in enumerate((range(4), range(4, 9), range(9, 12))):
        write_tar(tmp_path / f"shard-{number:03d}.tar", samples(numbers))
    return tmp_path


def one_shard(tmp_path: Path, members: Mapping[str, bytes], **kwargs: Any) -> WebDataset:
    return WebDataset(urls=str(write_tar(tmp_path / "one.tar", members)), **kwargs)


def grays(dataset: Any) -> list[int]:
    return [dataset[index][0].getpixel((0, 0))[0] for index in range(len(dataset))]


def targets(dataset: WebDataset) -> list[int | None]:
    return [dataset.get_target(index) for index in range(len(dataset))]


# What is a sample


def test_images_and_labels_of_all_shards_in_order(shards: Path) -> None:
    dataset = WebDataset(urls=str(shards))
    assert grays(dataset) == list(range(12))
    assert targets(dataset) == dataset.get_targets().tolist() == [number % 3 for number in range(12)]
    assert dataset.get_targets().dtype == np.int64
    assert dataset.get_image_relpath(4) == "shard-001.tar/00004.png"
    assert dataset.root == str(shards)


def test_members_up_to_the_first_dot_of_the_file_name_are_one_sample(tmp_path: Path) -> None:
    dataset = one_shard(
        tmp_path,
        {
            "a.b/1.txt": b"a note",
            "a.b/1.thumb.png": png(99),
            "a.b/1.PNG": png(1),
            "a.b/1.jpg": b"a second image",
            "a.b/1.cls": b" 7\n",
            "a.b/2.png": png(2),
            "c/2.png": png(3),
            "c/2.cls": b"8",
            "c/.hidden.png": png(98),
        },
    )
    assert grays(dataset) == [1, 2, 3]
    assert targets(dataset) == [7, None, 8]
    assert [dataset.get_image_relpath(index) for index in range(3)] == [
        "one.tar/a.b/1.PNG",
        "one.tar/a.b/2.png",
        "one.tar/c/2.png",
    ]


def test_samples_without_an_image_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = one_shard(tmp_path, {"1.txt": b"", "2.png": png(2), "3.heic": b""})
    assert grays(dataset) == [2]
    assert "2 samples have no image and are left out, e.g. 1.txt" in caplog.text


def test_names_with_dots_of_their_own_are_samples(tmp_path: Path) -> None:
    members = {
        "v1.4.png": png(1),
        "v1.4.cls": b"4",
        "v1.5.png": png(2),
        "v1.5.cls": b"5",
        "photo.large.JPG": png(3),
        "photo.large.cls": b"6",
        "plain.png": png(4),
        "plain.cls": b"7",
    }
    dataset = one_shard(tmp_path, members)
    assert grays(dataset) == [1, 2, 3, 4] and targets(dataset) == [4, 5, 6, 7]
    assert dataset.get_image_relpath(2) == "one.tar/photo.large.JPG"


def test_a_companion_without_its_image_is_not_taken_for_an_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = one_shard(tmp_path, {"1.jpg": png(1), "1.mask.png": png(9), "2.mask.png": png(8), "2.cls": b"1"})
    assert grays(dataset) == [1]
    assert "1 samples have no image and are left out, e.g. 2.mask.png" in caplog.text
    assert "1 images are not used, because they belong to samples that have another image, e.g. 1.mask.png" in (
        caplog.text
    )


def test_members_of_one_name_are_samples_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "one.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(3):
            for name, data in (("1.png", png(number)), ("1.cls", str(number).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    dataset = WebDataset(urls=str(path))
    assert grays(dataset) == targets(dataset) == [0, 1, 2]


def test_links_are_the_files_that_they_lead_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "one.tar"
    files = {"b/1.png": png(1), "b/1.cls": b"1", "c/2.png": png(2), "c/2.cls": b"2"}
    links = [  # (before the files, kind, name, what it leads to)
        (True, tarfile.SYMTYPE, "a/later.png", "../b/../b/again.png"),
        (False, tarfile.SYMTYPE, "b/again.png", "1.png"),
        (False, tarfile.LNKTYPE, "d/2.png", "c/2.png"),
        (False, tarfile.LNKTYPE, "d/2.cls", "c/2.cls"),
        (False, tarfile.SYMTYPE, "e/lost.png", "/data/lost.png"),
    ]
    with tarfile.open(path, "w") as tar:
        for before in (True, False):
            for _, kind, name, target in (link for link in links if link[0] is before):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, target
                tar.addfile(info)
            for name, data in files.items() if before else ():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    dataset = WebDataset(urls=str(path))
    names = [dataset.get_image_relpath(index).removeprefix("one.tar/") for index in range(len(dataset))]
    assert dict(zip(names, grays(dataset), strict=True)) == {
        "a/later.png": 1,
        "b/1.png": 1,
        "c/2.png": 2,
        "b/again.png": 1,
        "d/2.png": 2,
    }
    assert dataset.get_target(names.index("d/2.png")) == 2
    assert "1 samples have no image and are left out, e.g. e/lost.png, a link to /data/lost.png" in caplog.text


def test_images_of_other_kinds_are_taken_where_there_is_none_of_the_usual(tmp_path: Path) -> None:
    members = {"1.jfif": png(1), "2.bmp": png(9), "2.png": png(2), "3.tif": png(3), "3.cls": b"0"}
    assert grays(one_shard(tmp_path, members)) == [1, 2, 3]
    assert grays(one_shard(tmp_path, members, image="png")) == [2]


def test_names_that_are_not_utf_8_are_kept_in_the_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old_name = os.fsdecode(b"caf\xe9")
    path = tmp_path / "one.tar"
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape", format=tarfile.GNU_FORMAT) as tar:
        for name, data in ((f"{old_name}.png", png(1)), (f"{old_name}.cls", b"cat"), (f"{old_name}2.txt", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for _ in range(2):  # with a new index, and with the stored one
        dataset = WebDataset(urls=str(path))
        assert dataset.get_image_relpath(0) == f"one.tar/{old_name}.png" and grays(dataset) == [1]
        assert f"left out, e.g. {old_name}2.txt" in caplog.text
        with pytest.raises(ValueError, match=f"one\\.tar: {old_name}\\.cls: the label"):
            dataset.get_targets()
        caplog.clear()


def test_archives_of_other_kinds_are_named(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("shard-003.tar.zst", "more.zip", "list.txt"):
        (shards / name).write_bytes(b"x")
    assert len(WebDataset(urls=str(shards))) == len(WebDataset(urls=str(shards))) == 12  # also beside the indices
    assert caplog.text.count("left out 2 archives") == 2 and "more.zip, shard-003.tar.zst" in caplog.text


def test_image_extensions_can_be_chosen(tmp_path: Path) -> None:
    members = {"1.left.png": png(1), "1.right.png": png(2)}
    assert grays(one_shard(tmp_path, members, image="right.png;jpg")) == [2]


@pytest.mark.parametrize(
    ("label", "members", "expected"),
    [
        ("json.class_id", {"1.png": png(1), "1.json": b'{"class_id": 5}'}, 5),
        ("json.label.id", {"1.png": png(1), "1.json": b'{"label": {"id": 6}}'}, 6),
        ("json.class_id", {"1.png": png(1), "1.json": b'{"other": 5}'}, None),
        ("json.class_id", {"1.png": png(1), "1.json": b'{"class_id": null}'}, None),
        ("txt", {"1.txt": b"12", "1.png": png(1)}, 12),
        ("cls", {"1.png": png(1)}, None),
    ],
)
def test_labels_are_integers_in_text_or_json(
    label: str, members: dict[str, bytes], expected: int | None, tmp_path: Path
) -> None:
    assert one_shard(tmp_path, members, label=label).get_target(0) == expected


@pytest.mark.parametrize(
    ("label", "member", "content", "found"),
    [
        ("cls", "1.cls", b"tench", "'tench'"),
        ("json.id", "1.json", b'{"id": "5"}', "'5'"),
        ("json.id", "1.json", b'{"id": true}', "True"),
        ("json.id", "1.json", b"not json", "'not json'"),
    ],
)
def test_labels_of_another_kind_are_quoted_when_labels_are_asked_for(
    label: str, member: str, content: bytes, found: str, tmp_path: Path
) -> None:
    url = str(write_tar(tmp_path / "one.tar", {"1.png": png(1), member: content}))
    for _ in range(2):  # with a new index, and with the stored one
        dataset = WebDataset(urls=url, label=label)
        assert dataset[0][0].getpixel((0, 0)) == (1, 1, 1) and dataset[0][1] is None
        with pytest.raises(
            ValueError, match=rf"one\.tar: {member}: the label \(label={label}\) must be an integer, found {found}"
        ):
            dataset.get_targets()


def test_without_labels_there_are_no_targets_and_with_some_missing_the_first_is_named(tmp_path: Path) -> None:
    assert one_shard(tmp_path, samples(range(3), label=False)).get_targets() is None
    dataset = one_shard(tmp_path, sample(0) | sample(1, label=False) | sample(2))
    with pytest.raises(ValueError, match=r"1 of 3 samples have no label, the first is one\.tar/00001\.png"):
        dataset.get_targets()


# Which shards


def test_ranges_keep_their_zeros_and_are_joined_by_semicolons(shards: Path) -> None:
    urls = f"{shards}/shard-{{000..001}}.tar;{shards}/shard-002.tar"
    assert [path.name for path in expand_urls(urls)] == ["shard-000.tar", "shard-001.tar", "shard-002.tar"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{0..1}-{5..6}", ["0-5", "0-6", "1-5", "1-6"]),
    ],
)
def test_ranges(pattern: str, names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / f"{name}.tar").touch()
    assert [path.stem for path in expand_urls(f"{tmp_path}/{pattern}.tar")] == names


@pytest.mark.parametrize("urls", ["{0}", "{0}/*.tar", "{0}/shard-00[0-2].tar", "{0}/**/*"])
def test_directories_and_patterns_are_searched_in_order(urls: str, shards: Path) -> None:
    (shards / "notes.txt").touch()
    assert [path.name for path in expand_urls(urls.format(shards))] == [f"shard-00{number}.tar" for number in range(3)]


@pytest.mark.parametrize(
    ("urls", "error", "message"),
    [
        ("{0}/shard-{{000..004}}.tar", FileNotFoundError, r"2 of 5 shards of urls=.* do not exist, the first is .*003"),
        ("{0}/none-*.tar", FileNotFoundError, r"no shard matches '.*/none-\*\.tar'"),
        ("{0}/empty", FileNotFoundError, r"no shards in .*empty: looked for files ending in \.tar, .* 1 other files"),
        ("{0}/shard-{{2..1}}.tar", ValueError, r"the range \{2\.\.1\} of urls=.* is empty"),
        ("https://host/a.tar", ValueError, r"'https://host/a\.tar' is not a local file"),
        (";", ValueError, "give urls="),
    ],
)
def test_shards_that_are_not_there_are_named(urls: str, error: type[Exception], message: str, shards: Path) -> None:
    (shards / "empty").mkdir()
    (shards / "empty" / "notes.txt").touch()
    with pytest.raises(error, match=message):
        WebDataset(urls=urls.format(shards))


def test_shards_without_images_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no images in 1 shards, .*one\.tar: 1 samples .* jpg, jpeg, png, webp"
    ):
        one_shard(tmp_path, {"1.txt": b""})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "fast"}, "mode='fast' is not one of indexed, stream"),
        ({"buffer": 0}, "buffer must be at least 1, got 0"),
        ({"on_bad_image": "ignore"}, "on_bad_image='ignore' is not one of raise, skip"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs: dict[str, Any], message: str, shards: Path) -> None:
    with pytest.raises(ValueError, match=message):
        WebDataset(urls=str(shards), **kwargs)


# The index


def indices_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith(".tar"))


def test_an_index_is_written_beside_each_shard_and_read_again(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WebDataset(urls=str(shards))
    assert indices_of(shards) == [f"shard-00{number}.tar.idx.npz" for number in range(3)]
    monkeypatch.setattr("dinov3.data.datasets.shard_index.make_index", None)
    assert grays(WebDataset(urls=str(shards))) == list(range(12))


def test_indices_can_lie_elsewhere(shards: Path, tmp_path: Path) -> None:
    write_tar(shards / "more" / "shard-000.tar", samples(range(1)))
    urls = f"{shards};{shards}/more"
    assert len(WebDataset(urls=urls, extra=str(tmp_path / "extra"))) == 13
    assert not list(shards.glob("*.npz"))
    assert (tmp_path / "extra/more/shard-000.tar.idx.npz").exists()


@pytest.mark.parametrize("change", ["content", "time", "rules"])
def test_an_index_is_made_again_when_the_shard_or_the_rules_change(change: str, shards: Path) -> None:
    shard = shards / "shard-000.tar"
    WebDataset(urls=str(shard))
    before = (shards / "shard-000.tar.idx.npz").stat().st_ino
    if change == "content":
        write_tar(shard, samples(range(20, 22)))
        assert grays(WebDataset(urls=str(shard))) == [20, 21]
    elif change == "time":
        os.utime(shard, ns=(0, 5))
        WebDataset(urls=str(shard))
    else:
        assert targets(WebDataset(urls=str(shard), label="none")) == [None] * 4
    assert (shards / "shard-000.tar.idx.npz").stat().st_ino != before


def test_an_unreadable_index_is_made_again(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    WebDataset(urls=str(shards))
    cut_off(shards / "shard-001.tar.idx.npz", 100)
    assert len(WebDataset(urls=str(shards))) == 12
    assert "making the unreadable index" in caplog.text


def test_an_index_is_never_seen_half_written(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        WebDataset(urls=str(shards))
    assert indices_of(shards) == []


def test_a_directory_that_cannot_be_written_asks_for_another(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("dinov3.data.datasets.shard_index.atomic_write", refuse)
    with pytest.raises(
        PermissionError, match=r"cannot write the index .*shard-000\.tar\.idx\.npz.*give extra=DIRECTORY"
    ):
        WebDataset(urls=str(shards))


def test_the_command_writes_the_indices(shards: Path) -> None:
    dump_module.main([f"WebDataset:urls={shards}/shard-{{000..002}}.tar"])
    assert len(indices_of(shards)) == 3
    with pytest.raises(FileNotFoundError, match="no shard matches"):
        dump_module.main([f"WebDataset:urls={shards}/none-*"])


def test_each_process_begins_to_index_elsewhere(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    original = web_dataset.load_index
    monkeypatch.setattr(
        web_dataset, "load_index", lambda shard, *args: order.append(shard.stem) or original(shard, *args)
    )
    monkeypatch.setattr("dinov3.distributed.get_world_size", lambda: 3)
    monkeypatch.setattr("dinov3.distributed.get_rank", lambda: 2)
    assert grays(WebDataset(urls=str(shards))) == list(range(12))
    assert order == ["shard-002", "shard-000", "shard-001"]


# Shards that end early


def test_a_shard_that_ends_early_is_named_with_the_byte(shards: Path) -> None:
    cut_off(shards / "shard-001.tar", 5000)
    for _ in range(2):  # found, and then known from the index
        with pytest.raises(BrokenTarError, match=r"shard-001\.tar ends early, .*at byte 5000.*on_bad_image=skip"):
            WebDataset(urls=str(shards))


def test_of_a_shard_that_ends_early_the_readable_members_can_be_used(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A member takes 1024 bytes: of the second shard this leaves three samples, and of the third only the image.
    cut_off(shards / "shard-001.tar", 5 * 1024 + 100)
    dataset = WebDataset(urls=str(shards), on_bad_image="skip")
    assert grays(dataset) == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    assert dataset.get_targets().tolist() == [number % 3 for number in grays(dataset)]
    assert (
        "shard-001.tar ends early, at byte 5220: it has no end-of-archive mark" in caplog.text
        and "using its 2 complete samples" in caplog.text
    )


def test_images_without_labels_are_kept_up_to_the_last_whole_one(shards: Path) -> None:
    shard = cut_off(write_tar(shards / "plain.tar", samples(range(5), label=False)), 3 * 1024)
    assert grays(WebDataset(urls=str(shard), on_bad_image="skip")) == [0, 1, 2]


def test_what_to_do_with_broken_shards_comes_from_the_string_or_else_from_the_caller(shards: Path) -> None:
    cut_off(shards / "shard-001.tar", 5000)
    string = f"WebDataset:urls={shards}"
    assert len(make_dataset(dataset_str=f"{string}:on_bad_image=skip")) < 12
    assert len(make_dataset(dataset_str=string, on_bad_image="skip")) < 12
    assert len(make_dataset(dataset_str=f"{string}+{string}", on_bad_image="skip")) < 24
    for kwargs in ({}, {"on_bad_image": "raise"}):
        with pytest.raises(BrokenTarError):
            make_dataset(dataset_str=string, **kwargs)
    with pytest.raises(BrokenTarError):
        make_dataset(dataset_str=f"{string}:on_bad_image=raise", on_bad_image="skip")


def test_a_shard_that_is_cut_off_after_it_was_opened_names_the_image(shards: Path) -> None:
    dataset = WebDataset(urls=str(shards))
    cut_off(shards / "shard-002.tar", 1100)
    with pytest.raises(
        RuntimeError, match=r"cannot read image 10, .*shard-002\.tar/00010\.png: .*ends early, at byte 1100"
    ):
        dataset[10]


# Streams


def compressed(tmp_path: Path, n_shards: int = 4, per_shard: int = 7) -> str:
    for number in range(n_shards):
        numbers = range(number * per_shard, (number + 1) * per_shard)
        write_tar(tmp_path / f"{number}.tar.gz", samples(numbers), mode="w:gz")
    return f"{tmp_path}/{{0..{n_shards - 1}}}.tar.gz"


def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
    return {"grays": torch.tensor([image.getpixel((0, 0))[0] for image, _ in batch])}


def train_batches(dataset: Any, count: int, **kwargs: Any) -> list[list[int]]:
    arguments = {
        "batch_size": 3,
        "num_workers": 0,
        "sampler_type": SamplerType.INFINITE,
        "sampler_seed": 2,
        "collate_fn": collate,
        "seed_key": (0, 0, 0),
    }
    loader = make_train_data_loader(dataset=dataset, **(arguments | kwargs))
    return [batch["grays"].tolist() for batch in itertools.islice(loader, count)]


def test_compressed_shards_are_refused_unless_they_are_streamed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0\.tar\.gz is compressed.*add mode=stream, or unpack"):
        WebDataset(urls=compressed(tmp_path))


def test_a_stream_is_an_ordinary_dataset_as_well(tmp_path: Path) -> None:
    dataset = WebDataset(urls=compressed(tmp_path), mode="stream")
    assert len(dataset) == 28
    assert [dataset[index][0].getpixel((0, 0))[0] for index in (20, 3, 27, 3)] == [20, 3, 27, 3]


def test_streams_are_shuffled_and_an_epoch_has_every_sample_once(tmp_path: Path) -> None:
    dataset = WebDataset(urls=compressed(tmp_path), mode="stream", buffer=8)
    epochs = np.array(train_batches(dataset, 28)).reshape(3, 28)
    assert all(sorted(epoch) == list(range(28)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.distributed)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_resumed_stream_continues_at_any_batch(num_workers: int, tmp_path: Path) -> None:
    dataset = WebDataset(urls=compressed(tmp_path), mode="stream", buffer=8)
    whole = train_batches(dataset, 30, num_workers=num_workers)
    for first in (1, 8, 19) if num_workers == 0 else (8,):
        resumed = train_batches(dataset, 30 - first, num_workers=num_workers, first_batch=first)
        assert resumed == whole[first:]


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_share_out_the_shards(tmp_path: Path) -> None:
    dataset = WebDataset(urls=compressed(tmp_path), mode="stream", buffer=8)
    batches = train_batches(dataset, 8, num_workers=2, batch_size=7)
    shards = [{gray // 7 for batch in batches[lane:4:2] for gray in batch} for lane in range(2)]
    assert len(shards[0]) == len(shards[1]) == 2 and not shards[0] & shards[1]
    assert sorted(sum(batches[:4], [])) == sorted(sum(batches[4:], [])) == list(range(28))


def test_processes_share_out_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = WebDataset(urls=compressed(tmp_path), mode="stream", buffer=8)
    shares = []
    monkeypatch.setattr("dinov3.distributed.get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("dinov3.distributed.get_rank", lambda rank=rank: rank)
        shares.append(sum(train_batches(dataset, 2, batch_size=7), []))
    assert sorted(shares[0] + shares[1]) == list(range(28))


def test_a_stream_reads_each_shard_once_per_pass_and_holds_a_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = WebDataset(urls=compressed(tmp_path), mode="stream", buffer=5)
    opened: list[str] = []
    original = web_dataset.open_tar
    monkeypatch.setattr(web_dataset, "open_tar", lambda path: opened.append(path.name) or original(path))
    most = 0
    loader = make_train_data_loader(
        dataset=dataset,
        batch_size=2,
        num_workers=0,
        sampler_type=SamplerType.INFINITE,
        sampler_seed=2,
        collate_fn=collate,
        seed_key=(0, 0, 0),
    )
    for _ in itertools.islice(loader, 2 * 14 - 4):
        most = max(most, len(dataset._held))
    assert most == 5
    assert sorted(opened) == sorted(["0.tar.gz", "1.tar.gz", "2.tar.gz", "3.tar.gz"] * 2)


def test_a_buffer_larger_than_the_data_holds_each_sample_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = WebDataset(urls=compressed(tmp_path), mode="stream", buffer=60)
    read: list[int] = []
    original = dataset._read
    monkeypatch.setattr(dataset, "_read", lambda index: read.append(index) or original(index))
    train_batches(dataset, 3)
    assert sorted(read) == list(range(28))


def test_a_compressed_shard_that_ends_early_is_an_error_or_gives_what_it_has(tmp_path: Path) -> None:
    noise = {f"{n}.png": bytes(np.random.default_rng(n).integers(0, 256, 20_000, dtype=np.uint8)) for n in range(5)}
    shard = write_tar(tmp_path / "x.tar.gz", noise, mode="w:gz")
    cut_off(shard, shard.stat().st_size * 3 // 4)
    with pytest.raises(BrokenTarError, match=r"x\.tar\.gz ends early or is damaged, at byte \d+ of its uncompressed"):
        WebDataset(urls=str(shard), mode="stream")
    dataset = WebDataset(urls=str(shard), mode="stream", on_bad_image="skip")
    assert [dataset.get_image_data(index) for index in range(len(dataset))] == list(noise.values())[: len(dataset)]
    assert len(dataset) in (2, 3)


def test_a_bad_image_of_a_stream_stops_the_run_or_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = samples(range(6)) | {"00003.png": b"nothing"}
    shard = write_tar(tmp_path / "x.tar.gz", members, mode="w:gz")
    dataset = WebDataset(urls=str(shard), mode="stream", buffer=2)
    with pytest.raises(RuntimeError, match=r"WebDataset: cannot read image 3, .*x\.tar\.gz/00003\.png"):
        train_batches(dataset, 4)
    with caplog.at_level(logging.WARNING, "dinov3"):
        seen = sum(train_batches(dataset, 4, on_bad_image="skip"), [])
    assert sorted(seen) == sorted([0, 1, 2, 4, 4, 5] * 2)
    assert caplog.text.count("cannot read image 3") == 1


def test_streams_cannot_be_joined(tmp_path: Path) -> None:
    string = f"WebDataset:urls={compressed(tmp_path)}:mode=stream:buffer=4"
    with pytest.raises(ValueError, match="mode=stream cannot be joined by"):
        make_dataset(dataset_str=f"{string}+{string}")


def test_a_pickled_stream_takes_nothing_with_it(tmp_path: Path) -> None:
    dataset = WebDataset(urls=compressed(tmp_path), mode="stream", buffer=20)
    train_batches(dataset, 1)
    assert len(dataset._held) == 20
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy._held) == 0 and copy[13][0].getpixel((0, 0))[0] == 13


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_does_not_move_the_position_of_its_parent(tmp_path: Path) -> None:
    noise = [bytes(np.random.default_rng(n).integers(0, 256, 300_000, dtype=np.uint8)) for n in range(6)]
    members = {f"{number}.png": data for number, data in enumerate(noise)}
    dataset = WebDataset(urls=str(write_tar(tmp_path / "x.tar.gz", members, mode="w:gz")), mode="stream")
    assert dataset.get_image_data(1) == noise[1]
    child = os.fork()
    if child == 0:
        os._exit(0 if dataset.get_image_data(4) == noise[4] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert dataset.get_image_data(2) == noise[2]


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("WebDataset:urls=/a:mode=fast", "mode='fast'.*WebDataset takes indexed, stream"),
        ("WebDataset:urls=/a:buffer=0", "buffer='0' must be a whole number of at least 1"),
        ("WebDataset:urls=/a:buffer=4k", "buffer='4k' must be a whole number"),
        ("WebDataset", "WebDataset needs urls"),
    ],
)
def test_bad_strings_are_refused_before_anything_is_opened(string: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dataset(dataset_str=string)
