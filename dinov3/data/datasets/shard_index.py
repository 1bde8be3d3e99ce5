"""The samples of one tar shard: found in one pass over its headers, kept in an index file for the next time.

Consecutive members with the same path up to the first dot of the file name are one sample: `cat/01.jpg`, `cat/01.cls`.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dinov3.data.datasets.files import write_atomically
from dinov3.data.datasets.labels import NO_LABEL
from dinov3.data.datasets.listing import PathList
from dinov3.data.datasets.tar import BrokenTarError, TarMember, is_compressed, iter_members, open_tar

logger = logging.getLogger("dinov3")


@dataclass(frozen=True)
class SampleRules:
    """Which member of a sample is its image, and where its label is.

    Attributes:
        image: extensions, in lower case, without the dot.
        label: extension of a member that holds an integer as text, or `<extension>.<key>` of one that holds JSON.
    """

    image: tuple[str, ...]
    label: str

    @property
    def label_extension(self) -> str:
        return self.label.partition(".")[0]

    @property
    def label_keys(self) -> list[str]:
        return self.label.split(".")[1:]


@dataclass
class ShardIndex:
    """The samples of a shard that have an image, N in number.

    Attributes:
        names: of the image members.
        offsets: int64 [N], of the images in the (uncompressed) archive, in bytes.
        sizes: int64 [N], of the images, in bytes.
        labels: int64 [N], `NO_LABEL` where there is none.
        n_skipped: samples without an image.
        problem: where and why the shard could not be read to its end; empty if it could.
    """

    names: PathList
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    n_skipped: int
    problem: str


@dataclass
class _Sample:
    key: str
    image: TarMember | None = None
    label: int = NO_LABEL


@dataclass
class _Scan:
    samples: list[_Sample] = field(default_factory=list)
    problem: str = ""


class _Stamp(NamedTuple):
    # What an index was made from; it is used as long as nothing of it has changed.
    size: int
    mtime_ns: int
    rules: str


def load_index(shard: Path, index_file: Path, rules: SampleRules) -> ShardIndex:
    """The index of a shard, from `index_file` if that was made from this very shard, else made and written there.

    Raises:
        ValueError: a label is not an integer.
        OSError: the shard cannot be read, or the index not written.
    """
    status = shard.stat()
    stamp = _Stamp(status.st_size, status.st_mtime_ns, repr(rules))
    index = _read(index_file, stamp)
    if index is None:
        index = make_index(shard, rules)
        _write(index_file, index, stamp)
    return index


def make_index(shard: Path, rules: SampleRules) -> ShardIndex:
    """Find the samples of a shard; of one that ends early, those before.

    Raises:
        ValueError: a label is not an integer.
    """
    scan = _scan(shard, rules)
    samples = scan.samples
    if scan.problem and samples and samples[-1].label == NO_LABEL and any(s.label != NO_LABEL for s in samples):
        samples = samples[:-1]  # its label is in the part that is missing
    kept = [(sample.image, sample.label) for sample in samples if sample.image is not None]
    return ShardIndex(
        names=PathList.of(image.name for image, _ in kept),
        offsets=np.array([image.data for image, _ in kept], dtype=np.int64),
        sizes=np.array([image.size for image, _ in kept], dtype=np.int64),
        labels=np.array([label for _, label in kept], dtype=np.int64),
        n_skipped=len(samples) - len(kept),
        problem=scan.problem,
    )


def _scan(shard: Path, rules: SampleRules) -> _Scan:
    scan = _Scan()
    with open_tar(shard) as file:
        try:
            for member, key, extension in _parts(file, shard, rules.label_extension):
                if not scan.samples or scan.samples[-1].key != key:
                    scan.samples.append(_Sample(key))
                sample = scan.samples[-1]
                if extension in rules.image and sample.image is None:
                    sample.image = member
                if member.content is not None:
                    sample.label = _parse_label(member.content, rules, f"{shard}: {member.name}")
        except BrokenTarError as error:
            scan.problem = str(error)
    return scan


def _parts(file: BinaryIO, shard: Path, label_extension: str) -> Iterator[tuple[TarMember, str, str]]:
    def is_label(member: TarMember) -> bool:
        return member.is_file and _split_name(member.name)[1] == label_extension

    for member in iter_members(file, shard, wants_content=is_label):
        key, extension = _split_name(member.name)
        if member.is_file and extension and not key.endswith("/"):
            yield member, key, extension


def _split_name(path: str) -> tuple[str, str]:
    directory, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return directory + (slash or "/") + stem, extension.lower()


def _parse_label(data: bytes, rules: SampleRules, where: str) -> int:
    try:
        if not rules.label_keys:
            return int(data)
        value: Any = json.loads(data)
        for key in rules.label_keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return NO_LABEL
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    except ValueError:
        value = data[:40].decode(errors="replace")
    raise ValueError(f"{where}: the label (label={rules.label}) must be an integer, found {value!r}")


def _read(index_file: Path, stamp: _Stamp) -> ShardIndex | None:
    if not index_file.is_file():
        return None
    try:
        with np.load(index_file) as stored:
            if _Stamp(*(stored[name].item() for name in _Stamp._fields)) != stamp:
                return None
            values = {name.name: stored[name.name] for name in fields(ShardIndex)}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("making the unreadable index %s anew: %s", index_file, error)
        return None
    values["names"] = PathList(values["names"])
    return ShardIndex(**values | {name: values[name].item() for name in ("n_skipped", "problem")})


def _write(index_file: Path, index: ShardIndex, stamp: _Stamp) -> None:
    arrays = {name.name: getattr(index, name.name) for name in fields(index)} | stamp._asdict()
    arrays["names"] = index.names.buffer
    try:
        write_atomically(index_file, lambda file: np.savez(file, **arrays))
    except PermissionError as error:
        raise PermissionError(
            f"WebDataset: cannot write the index {index_file}: permission denied; give extra=DIRECTORY for the indices"
        ) from error


def read_sample(file: BinaryIO, shard: Path, offset: int, size: int) -> bytes:
    """The bytes of an image from an open shard.

    Raises:
        BrokenTarError: the shard ends before them.
    """
    file.seek(offset)
    data = file.read(size)
    check_length(data, shard, offset, size)
    return data


def check_length(data: bytes, shard: Path, offset: int, size: int) -> None:
    """Raise BrokenTarError if a shard gave fewer bytes than its index has of an image."""
    if len(data) < size:
        end = f"{offset + len(data)} of its uncompressed content" if is_compressed(shard) else shard.stat().st_size
        raise BrokenTarError(
            f"{shard} ends early, at byte {end}: the image takes the bytes {offset} to {offset + size}"
        )
