"""The samples of one tar shard: found in one pass over its headers, kept in an index file for the next time.

Consecutive members with the same path up to the first dot of the file name are one sample: `cat/01.jpg`, `cat/01.cls`.

Notable: no image is left out without a word.
- Names may have dots of their own (`cat/v1.5.jpg`, `cat/v1.5.cls`): members that have no image by the rule above belong
  together up to the last dot, unless they end like companions of other images (`01.mask.png` beside `01.jpg`).
- A name that comes again begins a new sample: people pack folders whose file names repeat.
- Links are the files that they lead to.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.data.datasets.extended import NO_LABEL
from dinov3.data.datasets.listing import PathList
from dinov3.data.datasets.tar import BrokenTarError, TarMember, iter_files, open_tar, resolve_links
from dinov3.utils.files import atomic_write

logger = logging.getLogger("dinov3")

FORMAT = 2  # of index files


@dataclass(frozen=True)
class SampleRules:
    """Which member of a sample is its image, and which holds its label.

    Attributes:
        image: extensions, in lower case, without the dot.
        label: extension of a member that holds an integer as text, or `<extension>.<key>` of one that holds JSON.
        fallback: extensions of images for samples that have none of `image`.
    """

    image: tuple[str, ...]
    label: str
    fallback: tuple[str, ...] = ()

    @property
    def label_extension(self) -> str:
        return self.label.partition(".")[0]

    def find_image(self, members: dict[str, TarMember]) -> TarMember | None:
        """Return the first of a sample's members, by extension, that is an image."""
        for extensions in (self.image, self.fallback):
            for extension, member in members.items():
                if extension in extensions and member.target is None:
                    return member
        return None


@dataclass
class ShardIndex:
    """The N samples of a shard that have an image.

    Attributes:
        names: of the image members.
        offsets: int64 [N], of the images in the (uncompressed) archive, in bytes.
        sizes: int64 [N], of the images, in bytes.
        labels: int64 [N], `NO_LABEL` where there is none.
        n_skipped: samples without an image.
        skipped: a member of the first of them.
        n_unused: members that end like images, in samples that have another image.
        unused: name of the first of them.
        label_problem: which label is not an integer, if there is one; those count as `NO_LABEL`.
        problem: where and why the shard could not be read to its end; empty if it could.
    """

    names: PathList
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    n_skipped: int
    skipped: str
    n_unused: int
    unused: str
    label_problem: str
    problem: str


def load_index(shard: Path, index_file: Path, rules: SampleRules) -> ShardIndex:
    """Read the index of a shard from `index_file`, or make and write it if the shard or the rules have changed.

    Raises:
        OSError: the shard cannot be read, or the index not written.
    """
    status = shard.stat()
    # The index is used again as long as none of these has changed.
    made_from = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "rules": repr(rules), "format": FORMAT}
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
    """Find the samples of a shard; if it ends early, those before that."""
    members: list[TarMember] = []
    problem = ""
    ending = f".{rules.label_extension}"
    try:
        for member in iter_files(shard, wants_content=lambda name: name.lower().endswith(ending)):
            members.append(member)
    except BrokenTarError as error:
        problem = str(error)
    samples = list(_find_samples(resolve_links(members), rules))
    labels, label_problem = [], ""
    for sample in samples:
        try:
            label = _find_label(sample, shard, rules)
        except ValueError as error:
            label, label_problem = NO_LABEL, label_problem or str(error)
        labels.append(label)
    if problem and samples and labels[-1] == NO_LABEL and any(label != NO_LABEL for label in labels):
        del samples[-1], labels[-1]  # its label is in the part that is missing
    images = [rules.find_image(sample) for sample in samples]
    found = [(image, label) for image, label in zip(images, labels, strict=True) if image is not None]
    skipped = [sample for sample, image in zip(samples, images, strict=True) if image is None]
    unused = [
        member.name
        for sample, image in zip(samples, images, strict=True)
        for extension, member in sample.items()
        if image is not None and member is not image and extension.rpartition(".")[2] in rules.image + rules.fallback
    ]
    return ShardIndex(
        names=PathList.of(image.name for image, _ in found),
        offsets=np.array([image.data for image, _ in found], dtype=np.int64),
        sizes=np.array([image.size for image, _ in found], dtype=np.int64),
        labels=np.array([label for _, label in found], dtype=np.int64),
        n_skipped=len(skipped),
        skipped=_describe(skipped[0]) if skipped else "",
        n_unused=len(unused),
        unused=unused[0] if unused else "",
        label_problem=label_problem,
        problem=problem,
    )


def _find_samples(members: Iterable[TarMember], rules: SampleRules) -> Iterator[dict[str, TarMember]]:
    # Each sample as its members by extension.
    samples: list[dict[str, TarMember]] = []
    last_key = None
    for member in members:
        key, extension = _split_name(member.name)
        if not extension or key.endswith("/"):
            continue
        if key != last_key or extension in samples[-1]:
            samples.append({})
        samples[-1][extension] = member
        last_key = key
    has_image = [any(extension in rules.image + rules.fallback for extension in sample) for sample in samples]
    companions = {extension for sample, has in zip(samples, has_image, strict=True) if has for extension in sample} - {
        *rules.image,
        *rules.fallback,
    }
    for sample, has in zip(samples, has_image, strict=True):
        yield from [sample] if has else _split_at_last_dot(sample, companions)


def _split_at_last_dot(sample: dict[str, TarMember], companions: set[str]) -> list[dict[str, TarMember]]:
    parts: dict[str, dict[str, TarMember]] = {}
    for extension, member in sample.items():
        stem, _, last = ("", "", extension) if extension in companions else extension.rpartition(".")
        parts.setdefault(stem, {})[last] = member
    return list(parts.values())


def _find_label(sample: dict[str, TarMember], shard: Path, rules: SampleRules) -> int:
    member = sample.get(rules.label_extension)
    if member is None or member.target is not None:
        return NO_LABEL
    content = member.content
    if content is None:  # a link to a member of another extension
        with open_tar(shard) as file:
            file.seek(member.data)
            content = file.read(member.size)
    return _parse_label(content, rules, f"{shard}: {member.name}")


def _describe(sample: dict[str, TarMember]) -> str:
    for member in sample.values():
        if member.target is not None:
            return f"{member.name}, a link to {member.target}, which the shard does not have"
    return next(iter(sample.values())).name


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
            if any(name not in stored or stored[name].item() != value for name, value in made_from.items()):
                return None
            return ShardIndex(
                names=PathList(stored["names"]),
                offsets=stored["offsets"],
                sizes=stored["sizes"],
                labels=stored["labels"],
                n_skipped=stored["n_skipped"].item(),
                skipped=stored["skipped"].item(),
                n_unused=stored["n_unused"].item(),
                unused=stored["unused"].item(),
                label_problem=stored["label_problem"].item(),
                problem=stored["problem"].item(),
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("making the unreadable index %s again: %s", index_file, error)
        return None
