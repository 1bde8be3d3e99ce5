"""Images in tar shards, as the `webdataset` tools write them.

Notable:
- Every shard is indexed once, in one pass over its headers. With the index this is a dataset like any other: all
  samplers, exact resume, evaluation.
- `mode=stream` is for compressed shards and for disks where random access is slow: a training loader then reads the
  shards from front to back (`dinov3.data.stream_order`), and hands each sample out of a buffer.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dinov3 import distributed
from dinov3.data.datasets.extended import ON_BAD_IMAGE, ExtendedVisionDataset
from dinov3.data.datasets.files import OpenFiles
from dinov3.data.datasets.labels import NO_LABEL, all_or_no_labels
from dinov3.data.datasets.shard_index import SampleRules, ShardIndex, check_length, load_index, read_sample
from dinov3.data.datasets.tar import SUFFIXES, BrokenTarError, is_compressed, is_tar, open_tar

logger = logging.getLogger("dinov3")

MODES = ("indexed", "stream")
DEFAULT_IMAGE = "jpg;jpeg;png;webp"
DEFAULT_BUFFER = 4096
OPEN_SHARDS = 16

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class StreamLayout(NamedTuple):
    """What the order of a stream is made from.

    Attributes:
        counts: int64, samples of each shard, in the order of their indices in the dataset.
        buffer: samples that a worker holds in memory to shuffle them.
    """

    counts: np.ndarray
    buffer: int


class WebDataset(ExtendedVisionDataset):
    """The images of tar shards.

    Args:
        urls: shards: a path, a directory, a glob pattern or a range `shard-{000..127}.tar`; several joined by `;`.
        image: extensions of images, joined by `;`. The first such member of a sample is its image; samples without
            one are left out.
        label: extension of the member that holds the class index as text, or `<extension>.<key>` of a member that holds
            JSON, e.g. `json.class_id`. Samples without one have no label.
        extra: directory of the index files; None: they lie beside the shards.
        mode: `indexed`: any sample at any time; `stream`: training loaders read the shards from front to back.
        buffer: for `stream`, samples that each worker holds in memory to shuffle them.
        on_bad_image: what to do with a shard that ends early: `raise`, or `skip`: use what can be read of it.
        transforms: of (image, target); or else
        transform: of the PIL image, and
        target_transform: of the class index.

    Attributes:
        shards: their paths.
        stream: the layout of the shards with `mode="stream"`, else None.

    Raises:
        FileNotFoundError: a shard does not exist, or no sample has an image.
        BrokenTarError: a ValueError; a shard ends early.
        ValueError: an argument out of range, a label that is no integer, or compressed shards without `mode="stream"`.
    """

    classes: list[str] | None = None  # labels have no names

    def __init__(
        self,
        *,
        urls: str,
        image: str = DEFAULT_IMAGE,
        label: str = "cls",
        extra: str | None = None,
        mode: str = "indexed",
        buffer: int = DEFAULT_BUFFER,
        on_bad_image: str = "raise",
        transforms: Callable[[Any, Any], Any] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        _check_arguments(mode, buffer, on_bad_image)
        self.shards = expand_urls(urls)
        root = Path(os.path.commonpath([shard.parent for shard in self.shards]))
        super().__init__(root=str(root), transforms=transforms, transform=transform, target_transform=target_transform)
        self._any_compressed = any(map(is_compressed, self.shards))
        if self._any_compressed and mode != "stream":
            first = next(filter(is_compressed, self.shards))
            raise ValueError(
                f"WebDataset: {first} is compressed: to read one image, all before it must be unpacked; "
                "add mode=stream, or unpack the shards to .tar"
            )
        rules = SampleRules(tuple(image.lower().split(";")), label)
        directory = Path(extra).expanduser() if extra else root
        index_files = [directory / f"{shard.relative_to(root)}.idx.npz" for shard in self.shards]
        self._take_over(_load_indices(self.shards, index_files, rules), rules, on_bad_image)
        self.stream = StreamLayout(np.diff(self._ends, prepend=0), buffer) if mode == "stream" else None
        self._files = OpenFiles(OPEN_SHARDS)
        self._reader = ShardReader()
        self._held = HeldSamples()

    def get_image_relpath(self, index: int) -> str:
        """Shard and member of sample `index`, as `<shard>/<member>`."""
        shard = self._shard_of(index)
        name = self._names[shard][index - self._start_of(shard)]
        return f"{self.shards[shard].relative_to(self.root)}/{name}"

    def get_image_data(self, index: int) -> bytes:
        held = self._held.take(index)
        return self._read(index) if held is None else held

    def get_target(self, index: int) -> int | None:
        """The class index of sample `index`; None without a label."""
        label = int(self._labels[index])
        return None if label == NO_LABEL else label

    def get_targets(self) -> np.ndarray | None:
        """The class indices of all samples, int64; None without labels.

        Raises:
            ValueError: some samples have a label and some have none.
        """
        return all_or_no_labels(self._labels, "WebDataset", self.get_image_relpath)

    def read_ahead(self, indices: Sequence[int], *, restart: bool) -> None:
        """Hold the images of samples that will be asked for soon. What cannot be read is left for `get_image_data`.

        Args:
            indices: in the order in which they lie in the shards.
            restart: forget first what is held.
        """
        if restart:
            self._held.clear()
        for index in indices:
            if not self._held.again(index):
                try:
                    self._held.add(index, self._read(index))
                except Exception as error:  # `get_image_data` will meet it too, where it can be reported
                    logger.debug("cannot read sample %d ahead: %s", index, error)

    def __len__(self) -> int:
        return len(self._labels)

    def _read(self, index: int) -> bytes:
        shard, offset, size = self.shards[self._shard_of(index)], int(self._offsets[index]), int(self._sizes[index])
        if is_compressed(shard):
            return self._reader.read(shard, offset, size)
        data = self._files.read(shard, offset, size)
        check_length(data, shard, offset, size)
        return data

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _start_of(self, shard: int) -> int:
        return int(self._ends[shard - 1]) if shard else 0

    def _take_over(self, indices: list[ShardIndex], rules: SampleRules, on_bad_image: str) -> None:
        for index in indices:
            if index.problem and on_bad_image == "raise":
                raise BrokenTarError(f"WebDataset: {index.problem}; {_USE_THE_REST}")
            if index.problem:
                logger.warning("WebDataset: %s; its %d whole samples are used", index.problem, len(index.names))
        self._names = [index.names for index in indices]
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        self._labels = np.concatenate([index.labels for index in indices])
        self._ends = np.cumsum([len(index.names) for index in indices])
        n_skipped = sum(index.n_skipped for index in indices)
        if not len(self):
            raise FileNotFoundError(
                f"WebDataset: no images in {len(indices)} shards, the first is {self.shards[0]}: "
                f"{n_skipped} samples have no member that ends in {', '.join(rules.image)}"
            )
        if n_skipped:
            logger.warning("WebDataset: %d samples have no image and are left out", n_skipped)


_USE_THE_REST = "copy the shard again, or use what can be read of it with on_bad_image=skip (train.on_bad_image=skip)"


class ShardReader:
    """Reads compressed shards: fast if each read is after the one before, in the same shard.

    One shard is open at a time. A forked or pickled copy opens it anew: it would share the position in the file.
    """

    def __init__(self) -> None:
        self._shard: Path | None = None
        self._file: BinaryIO | None = None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"_shard": None, "_file": None, "_process": None}

    def read(self, shard: Path, offset: int, size: int) -> bytes:
        """The bytes of an image, by its offset in the uncompressed archive."""
        if self._file is None or (shard, os.getpid()) != (self._shard, self._process):
            if self._file is not None:
                self._file.close()
            self._file, self._shard, self._process = open_tar(shard), shard, os.getpid()
        try:
            return read_sample(self._file, shard, offset, size)
        except Exception:
            self._file = None  # a decompressor that failed cannot go on
            raise


class HeldSamples:
    """Encoded images by index, each for as many times as it was announced; a pickled copy holds none."""

    def __init__(self) -> None:
        self._samples: dict[int, tuple[bytes, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_samples": {}}

    def __len__(self) -> int:
        return len(self._samples)

    def clear(self) -> None:
        """Hold nothing."""
        self._samples.clear()

    def add(self, index: int, data: bytes) -> None:
        """Hold an image for one use."""
        self._samples[index] = (data, 1)

    def again(self, index: int) -> bool:
        """Hold an image that is there for one more use; False if it is not there."""
        if index not in self._samples:
            return False
        data, uses = self._samples[index]
        self._samples[index] = (data, uses + 1)
        return True

    def take(self, index: int) -> bytes | None:
        """An image, for one use; None if it is not there."""
        data, uses = self._samples.pop(index, (None, 0))
        if data is not None and uses > 1:
            self._samples[index] = (data, uses - 1)
        return data


def expand_urls(urls: str) -> list[Path]:
    """The shards that `urls` names, see `WebDataset`.

    Raises:
        ValueError: it names nothing, or something that is not a local file.
        FileNotFoundError: a shard, or any for a directory or pattern, does not exist.
    """
    parts = [part for part in urls.split(";") if part]
    if not parts:
        raise ValueError("WebDataset: give urls=, e.g. urls=/data/shard-{000000..000127}.tar")
    shards = [shard for part in parts for path in _expand_braces(part) for shard in _find(path)]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(
            f"WebDataset: {len(missing)} of {len(shards)} shards of urls={urls!r} do not exist, "
            f"the first is {missing[0]}"
        )
    return [Path(os.path.abspath(shard)) for shard in shards]


def _expand_braces(text: str) -> list[str]:
    match = _BRACES.search(text)
    if match is None:
        return [text]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    if not numbers:
        raise ValueError(f"WebDataset: the range {match[0]} of urls={text!r} is empty: give the smaller number first")
    before, after = text[: match.start()], text[match.end() :]
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [f"{before}{number:0{width}d}{rest}" for number in numbers for rest in _expand_braces(after)]


def _find(path: str) -> list[Path]:
    if "://" in path or path.startswith("pipe:"):
        raise ValueError(f"WebDataset: {path!r} is not a local file; copy the shards, or mount where they lie")
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = sorted(name for name in os.listdir(path) if is_tar(name) and not name.startswith("."))
        if not found:
            raise FileNotFoundError(
                f"WebDataset: no shards in {path}: looked for files ending in {', '.join(SUFFIXES)} "
                f"and saw {len(os.listdir(path))} other files"
            )
        return [Path(path, name) for name in found]
    if not glob.has_magic(path) or os.path.isfile(path):
        return [Path(path)]
    matches = [Path(match) for match in sorted(glob.glob(path, recursive=True)) if is_tar(match)]
    if not matches:
        raise FileNotFoundError(f"WebDataset: no shard matches {path!r}")
    return matches


def _load_indices(shards: list[Path], index_files: list[Path], rules: SampleRules) -> list[ShardIndex]:
    # Each process begins elsewhere, so that several share out the work: what another has indexed need only be read.
    n_shards = len(shards)
    first = distributed.get_rank() * n_shards // distributed.get_world_size()
    order: Iterable[int] = ((first + step) % n_shards for step in range(n_shards))
    missing = sum(not path.is_file() for path in index_files)
    if missing:
        logger.info("WebDataset: indexing %d of %d shards, once", missing, n_shards)
    loaded = {number: load_index(shards[number], index_files[number], rules) for number in order}
    return [loaded[number] for number in range(n_shards)]


def _check_arguments(mode: str, buffer: int, on_bad_image: str) -> None:
    if mode not in MODES:
        raise ValueError(f"WebDataset: mode={mode!r} is not one of {', '.join(MODES)}")
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"WebDataset: on_bad_image={on_bad_image!r} is not one of {', '.join(ON_BAD_IMAGE)}")
    if buffer < 1:
        raise ValueError(f"WebDataset: buffer must be at least 1, got {buffer}")
