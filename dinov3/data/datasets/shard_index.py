"""The samples of one tar shard: found in one pass over its headers, kept in an index file for the next time.

Consecutive members with the same path up to the first dot of the file name are one sample: `cat/01.jpg`, `cat/01.cls`.
"""

from __future__ import annotations

import json
import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.data.datasets.extended import NO_LABEL
from dinov3.data.datasets.listing import PathList
from dinov3.data.datasets.tar import BrokenTarError, TarMember, iter_files
from dinov3.utils.files import atomic_write

logger = logging.getLogger("dinov3")


@dataclass(frozen=True)
class SampleRules:
    """Which member of a sample is its image, and which holds its label.

    Attributes:
        image: extensions, in lower case, without the dot.
        label: extension of a member that holds an integer as text, or `<extension>.<key>` of one that holds JSON.
    """

    image: tuple[str, ...]
    label: str


@dataclass
class ShardIndex:
    """The N samples of a shard that have an image.

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


def load_index(shard: Path, index_file: Path, rules: SampleRules) -> ShardIndex:
    """Read the index of a shard from `index_file`, or make and write it if the shard or the rules have changed.

    Raises:
        ValueError: a label is not an integer.
        OSError: the shard cannot be read, or the index not written.
    """
    status = shard.stat()
    # The index is used again as long as none of these has changed.
    made_from = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "rules": repr(rules)}
    index = _read(index_file, made_from)
    if index is None:
        index = make_index(shard, rules)
        arrays = vars(index) | {"names": index.names.buffer} | made_from
        try:
            with atomic_write(index_file) as file:
                np.savez(file, **arrays)
        except PermissionError as error:
            raise PermissionError(
                f"WebDataset: cannot write the index {index_file}: permission denied; give extra=DIRECTORY for the "
                "indices"
            ) from error
    return index


def make_index(shard: Path, rules: SampleRules) -> ShardIndex:
    """Find the samples of a shard; if it ends early, those before that.

    Raises:
        ValueError: a label is not an integer.
    """
    label_extension = rules.label.partition(".")[0]
    samples: list[_Sample] = []
    problem = ""
    try:
        for member in iter_files(shard, wants_content=lambda name: _split_name(name)[1] == label_extension):
            key, extension = _split_name(member.name)
            if not extension or key.endswith("/"):
                continue
            if not samples or samples[-1].key != key:
                samples.append(_Sample(key))
            if extension in rules.image and samples[-1].image is None:
                samples[-1].image = member
            if member.content is not None:
                samples[-1].label = _parse_label(member.content, rules, f"{shard}: {member.name}")
    except BrokenTarError as error:
        problem = str(error)
        labelled = any(sample.label != NO_LABEL for sample in samples)
        if labelled and samples[-1].label == NO_LABEL:
            del samples[-1]  # its label is in the part that is missing
    images = [(sample.image, sample.label) for sample in samples if sample.image is not None]
    return ShardIndex(
        names=PathList.of(image.name for image, _ in images),
        offsets=np.array([image.data for image, _ in images], dtype=np.int64),
        sizes=np.array([image.size for image, _ in images], dtype=np.int64),
        labels=np.array([label for _, label in images], dtype=np.int64),
        n_skipped=len(samples) - len(images),
        problem=problem,
    )


def _split_name(path: str) -> tuple[str, str]:
    directory, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return directory + (slash or "/") + stem, extension.lower()


def _parse_label(data: bytes, rules: SampleRules, where: str) -> int:
    keys = rules.label.split(".")[1:]
    try:
        if not keys:
            return int(data)
        value: Any = json.loads(data)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return NO_LABEL
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    except ValueError:
        value = data[:40].decode(errors="replace")
    raise ValueError(f"{where}: the label (label={rules.label}) must be an integer, found {value!r}")


def _read(index_file: Path, made_from: dict[str, Any]) -> ShardIndex | None:
    if not index_file.is_file():
        return None
    try:
        with np.load(index_file) as stored:
            if any(stored[name].item() != value for name, value in made_from.items()):
                return None
            return ShardIndex(
                names=PathList(stored["names"]),
                offsets=stored["offsets"],
                sizes=stored["sizes"],
                labels=stored["labels"],
                n_skipped=stored["n_skipped"].item(),
                problem=stored["problem"].item(),
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("making the unreadable index %s again: %s", index_file, error)
        return None
