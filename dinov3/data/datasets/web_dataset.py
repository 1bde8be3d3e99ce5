"""Images in tar shards, as the `webdataset` tools write them.

Every shard is indexed once, in one pass over its headers. With the index this is a dataset like any other: all
samplers, exact resume, evaluation. `mode=stream` is for compressed shards and for disks where random access is slow: a
training loader then reads the shards from front to back (`dinov3.data.stream_order`) and takes samples from a buffer.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Unpack

import numpy as np

from dinov3 import distributed
from dinov3.data.datasets.extended import NO_LABEL, ON_BAD_IMAGE, ExtendedVisionDataset, Transforms, all_or_no_labels
from dinov3.data.datasets.files import OpenFiles
from dinov3.data.datasets.listing import EXTENSIONS
from dinov3.data.datasets.shard_index import SampleRules, ShardIndex, load_index
from dinov3.data.datasets.tar import SUFFIXES, BrokenTarError, is_compressed, is_tar, open_tar
from dinov3.utils.messages import list_names

logger = logging.getLogger("dinov3")

MODES = ("indexed", "stream")
DEFAULT_IMAGE = "jpg;jpeg;png;webp"
DEFAULT_BUFFER = 4096
OPEN_SHARDS = 16

_OTHER_ARCHIVE = re.compile(r"\.tar\.\w+$|\.tzst$|\.zip$|\.7z$|\.rar$", re.IGNORECASE)
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class StreamLayout(NamedTuple):
    """The numbers that decide the order of a stream.

    Attributes:
        counts: int64, number of samples of each shard, in the order of their indices in the dataset.
        buffer: number of samples that a worker holds in memory to shuffle them.
    """

    counts: np.ndarray
    buffer: int


class WebDataset(ExtendedVisionDataset):
    """The images of tar shards.

    Args:
        urls: a path, a directory, a glob pattern or a range `shard-{000..127}.tar`; several joined by `;`.
        image: extensions of images, joined by `;`. The first such member of a sample is its image; samples without
            one are left out. Default: `jpg;jpeg;png;webp`, or else any image that `ImageFolder` reads.
        label: extension of the member that holds the class index as text, or `<extension>.<key>` of a member that holds
            JSON, e.g. `json.class_id`. Samples without one have no label.
        extra: directory of the index files. Default: beside the shards.
        mode: `indexed`: any sample at any time; `stream`: training loaders read the shards from front to back.
        buffer: for `stream`, number of samples that each worker holds in memory to shuffle them.
        on_bad_image: what to do with a shard that ends early: `raise`, or `skip`, which uses what can be read of it.
        **transforms: see `Transforms`; targets are class indices.

    Attributes:
        shards: their paths.
        stream: the layout of the shards with `mode="stream"`, otherwise None.

    Raises:
        FileNotFoundError: a shard does not exist, or no sample has an image.
        BrokenTarError: a ValueError; a shard ends early.
        ValueError: an argument out of range, or compressed shards without `mode="stream"`.
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
        **transforms: Unpack[Transforms],
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"WebDataset: mode={mode!r} is not one of {', '.join(MODES)}")
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"WebDataset: on_bad_image={on_bad_image!r} is not one of {', '.join(ON_BAD_IMAGE)}")
        if buffer < 1:
            raise ValueError(f"WebDataset: buffer must be at least 1, got {buffer}")
        self.shards = expand_urls(urls)
        compressed = next(filter(is_compressed, self.shards), None)
        if compressed is not None and mode != "stream":
            raise ValueError(
                f"WebDataset: {compressed} is compressed: to read one image, all before it must be unpacked; "
                "add mode=stream, or unpack the shards to .tar"
            )
        root = Path(os.path.commonpath([shard.parent for shard in self.shards]))
        super().__init__(root=str(root), **transforms)
        rules = SampleRules(tuple(image.lower().split(";")), label, EXTENSIONS if image == DEFAULT_IMAGE else ())
        directory = Path(extra).expanduser() if extra else root
        index_files = [directory / f"{shard.relative_to(root)}.idx.npz" for shard in self.shards]
        self._join(_load_indices(self.shards, index_files, rules), rules, on_bad_image)
        self.stream = StreamLayout(np.diff(self._ends, prepend=0), buffer) if mode == "stream" else None
        self._files = OpenFiles(OPEN_SHARDS)
        self._compressed = CompressedShardReader()
        # Encoded images that were read ahead, by index, each as often as it will be asked for.
        self._held: dict[int, list[bytes]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": {}}

    def get_image_relpath(self, index: int) -> str:
        """Return shard and member of sample `index`, as `<shard>/<member>`."""
        shard = self._find_shard(index)
        start = int(self._ends[shard - 1]) if shard else 0
        return f"{self.shards[shard].relative_to(self.root)}/{self._names[shard][index - start]}"

    def get_image_data(self, index: int) -> bytes:
        copies = self._held.get(index)
        if copies is None:
            return self._read(index)
        data = copies.pop()
        if not copies:
            del self._held[index]
        return data

    def get_target(self, index: int) -> int | None:
        """Return the class index of sample `index`, or None without a label."""
        label = int(self._labels[index])
        return None if label == NO_LABEL else label

    def get_targets(self) -> np.ndarray | None:
        """Return the class indices of all samples, int64, or None without labels.

        Raises:
            ValueError: some samples have a label and some have none, or a label is not an integer.
        """
        if self._label_problem:
            raise ValueError(self._label_problem)
        return all_or_no_labels(self._labels, "WebDataset", self.get_image_relpath)

    def read_ahead(self, indices: Sequence[int], *, restart: bool) -> None:
        """Read and hold the images of samples that will be asked for soon.

        Args:
            indices: in the order in which they lie in the shards.
            restart: first drop the images that are held.
        """
        if restart:
            self._held.clear()
        for index in indices:
            if index in self._held:
                self._held[index].append(self._held[index][0])
                continue
            try:
                self._held[index] = [self._read(index)]
            except Exception as error:  # `get_image_data` will meet it too, where it can be reported
                logger.debug("cannot read sample %d ahead: %s", index, error)

    def __len__(self) -> int:
        return len(self._labels)

    def _find_shard(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _read(self, index: int) -> bytes:
        shard, offset, size = self.shards[self._find_shard(index)], int(self._offsets[index]), int(self._sizes[index])
        compressed = is_compressed(shard)
        data = (self._compressed if compressed else self._files).read(shard, offset, size)
        if len(data) < size:
            end = f"{offset + len(data)} of its uncompressed content" if compressed else shard.stat().st_size
            raise BrokenTarError(
                f"{shard} ends early, at byte {end}: the image takes the bytes {offset} to {offset + size}"
            )
        return data

    def _join(self, indices: list[ShardIndex], rules: SampleRules, on_bad_image: str) -> None:
        for index in indices:
            if index.problem and on_bad_image == "raise":
                raise BrokenTarError(
                    f"WebDataset: {index.problem}; copy the shard again, or use what can be read of it with "
                    "on_bad_image=skip (train.on_bad_image=skip)"
                )
            if index.problem:
                logger.warning("WebDataset: %s; using its %d complete samples", index.problem, len(index.names))
        self._names = [index.names for index in indices]
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        self._labels = np.concatenate([index.labels for index in indices])
        self._ends = np.cumsum([len(index.names) for index in indices])  # first index after each shard
        self._label_problem = next((index.label_problem for index in indices if index.label_problem), "")
        if self._label_problem:  # a training without labels does not need them; whoever asks for them gets the error
            logger.info("WebDataset: %s; such images are read without a label", self._label_problem)
        n_skipped, n_unused = sum(index.n_skipped for index in indices), sum(index.n_unused for index in indices)
        skipped = next((index.skipped for index in indices if index.n_skipped), "")
        wanted = ", ".join(rules.image + rules.fallback)
        if not len(self):
            raise FileNotFoundError(
                f"WebDataset: no images in {len(indices)} shards, the first is {self.shards[0]}: {n_skipped} samples "
                f"have no member that ends in {wanted}" + (f", e.g. {skipped}" if skipped else "")
            )
        if n_skipped:
            text = "WebDataset: %d samples have no image and are left out, e.g. %s; images end in %s (image=...)"
            logger.warning(text, n_skipped, skipped, wanted)
        if n_unused:
            logger.warning(
                "WebDataset: %d images are not used, because they belong to samples that have another image, e.g. %s; "
                "members with the same path up to the first dot of the file name are one sample",
                n_unused,
                next(index.unused for index in indices if index.n_unused),
            )


class CompressedShardReader:
    """Reads compressed shards: fast if each read follows the one before in the same shard.

    One shard is open at a time. A forked or pickled copy opens its own: a shared file would share its position.
    """

    def __init__(self) -> None:
        self._shard: Path | None = None
        self._file: BinaryIO | None = None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"_shard": None, "_file": None, "_process": None}

    def read(self, shard: Path, offset: int, size: int) -> bytes:
        """Read up to `size` bytes from an offset in the uncompressed archive; fewer only where it ends."""
        if self._file is None or (shard, os.getpid()) != (self._shard, self._process):
            if self._file is not None:
                self._file.close()
            self._file, self._shard, self._process = open_tar(shard), shard, os.getpid()
        try:
            self._file.seek(offset)
            return self._file.read(size)
        except Exception:
            self._file = None  # a decompressor that failed cannot continue
            raise


def expand_urls(urls: str) -> list[Path]:
    """Find the shards that `urls` names, see `WebDataset`.

    Raises:
        ValueError: it names nothing, or something that is not a local file.
        FileNotFoundError: a shard does not exist, or a directory or pattern has none.
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
        names = [name for name in os.listdir(path) if not name.startswith(".")]
        found = sorted(name for name in names if is_tar(name))
        if others := [name for name in names if _OTHER_ARCHIVE.search(name) and name not in found]:
            text = "WebDataset: left out %d archives in %s that do not end in %s: %s"
            logger.warning(text, len(others), path, ", ".join(SUFFIXES), list_names(sorted(others), 3))
        if not found:
            raise FileNotFoundError(
                f"WebDataset: no shards in {path}: looked for files ending in {', '.join(SUFFIXES)} "
                f"and saw {len(names)} other files"
            )
        return [Path(path, name) for name in found]
    if not glob.has_magic(path) or os.path.isfile(path):
        return [Path(path)]
    matches = [Path(match) for match in sorted(glob.glob(path, recursive=True)) if is_tar(match)]
    if not matches:
        raise FileNotFoundError(f"WebDataset: no shard matches {path!r}")
    return matches


def _load_indices(shards: list[Path], index_files: list[Path], rules: SampleRules) -> list[ShardIndex]:
    # Each process begins at another shard, so that they share the work: an index that another one made is only read.
    n_shards = len(shards)
    first = distributed.get_rank() * n_shards // distributed.get_world_size()
    order: Iterable[int] = ((first + step) % n_shards for step in range(n_shards))
    missing = sum(not path.is_file() for path in index_files)
    if missing:
        logger.info("WebDataset: indexing %d of %d shards, once", missing, n_shards)
    loaded = {number: load_index(shards[number], index_files[number], rules) for number in order}
    return [loaded[number] for number in range(n_shards)]
