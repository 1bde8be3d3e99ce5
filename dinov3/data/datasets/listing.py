"""Every image file below a directory, in a fixed order, in little memory; the listing can be cached on disk."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov3.data.datasets.files import save_array
from dinov3.utils.messages import list_names
from dinov3.utils.text import read_lines

logger = logging.getLogger("dinov3")

#: Of the images that Pillow reads, those in which people keep pictures, the common ones first.
EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "pbm", "tif", "tiff", "gif", "avif"),
    *("jfif", "jpe", "mpo", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "apng", "avifs", "dib", "pnm", "qoi", "tga"),
)
#: Pictures all the same: leaving them out deserves a warning.
OTHER_IMAGES = (
    *("heic", "heif", "hif", "jxl", "svg", "psd", "ico", "icns", "dds", "exr", "hdr", "pfm", "sgi", "pcx", "eps"),
    *("dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "dcm", "nii", "fits", "fit"),
)
_SEPARATOR = b"\0"  # the one byte that no path can contain


class PathList:
    """An immutable list of paths in one buffer of bytes.

    A list of str would be copied page by page into every forked worker, because reading an element writes its reference
    count.
    """

    def __init__(self, buffer: np.ndarray) -> None:
        self.buffer = buffer  # uint8, each path followed by a zero
        self._ends = np.flatnonzero(buffer == 0)

    @classmethod
    def of(cls, paths: Iterable[str]) -> PathList:
        joined = b"".join(os.fsencode(path) + _SEPARATOR for path in paths)
        return cls(np.frombuffer(joined, dtype=np.uint8))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] + 1 if index else 0
        return os.fsdecode(self.buffer[start : self._ends[index]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


@dataclass
class Listing:
    """The images of a directory tree.

    Attributes:
        images: paths relative to the directory, separated by `/`.
        other_files: numbers of files that are not images, by extension.
        mtimes: time of last change (ns) of every directory of the tree, by relative path.
    """

    images: PathList
    other_files: Counter[str]
    mtimes: dict[str, int]


def list_images(directory: str | os.PathLike[str], extensions: Sequence[str] = EXTENSIONS) -> Listing:
    """List all images below `directory`, at any depth.

    An image is a file with one of the `extensions` (without dots), in any case. Names that begin with a dot are
    skipped. Symbolic links are followed; a directory is visited once, under its own name if that lies in the tree.

    Returns:
        The images ordered by first path component, then by directory path, then by file name.

    Raises:
        PermissionError: a directory cannot be read.
    """
    images: list[tuple[str, str]] = []
    other_files: Counter[str] = Counter()
    mtimes: dict[str, int] = {}
    visited: set[tuple[int, int]] = set()
    # Links come last, so that a directory of the tree keeps its own name.
    pending, linked = deque([""]), deque[str]()
    while pending or linked:
        relative = pending.popleft() if pending else linked.popleft()
        path = os.path.join(directory, relative)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        mtimes[relative] = status.st_mtime_ns
        for entry in _scan(path):
            inside = f"{relative}/{entry.name}" if relative else entry.name
            if entry.is_dir():
                (linked if entry.is_symlink() else pending).append(inside)
            elif (extension := os.path.splitext(entry.name)[1][1:].lower()) in extensions:
                images.append((relative, entry.name))
            else:
                other_files[extension] += 1
    # The order of torchvision's `ImageFolder`, so that sample and class indices agree with it.
    images.sort(key=lambda image: ((image[0] or image[1]).partition("/")[0], *image))
    paths = (f"{parent}/{name}" if parent else name for parent, name in images)
    pictures = {extension: n for extension, n in other_files.items() if extension in EXTENSIONS + OTHER_IMAGES}
    if images and pictures:
        text = "%s: left out %s; only files ending in %s are read: convert the others to one of these"
        logger.warning(text, directory, count_extensions(pictures), ", ".join(extensions))
    return Listing(PathList.of(paths), other_files, mtimes)


def count_extensions(other_files: Mapping[str, int], most: int = 8) -> str:
    """Describe `Listing.other_files`, the most frequent first: `"12 .heic, 3 .txt and 1 without an extension"`."""
    ordered = sorted(other_files.items(), key=lambda item: (-item[1], not item[0], item[0]))
    return list_names(
        [f"{n} .{extension}" if extension else f"{n} without an extension" for extension, n in ordered], most
    )


def list_images_cached(directory: str | os.PathLike[str], cache: str | os.PathLike[str]) -> Listing:
    """Return `list_images`, read from files in the directory `cache` unless a directory of the tree has changed.

    The cache may lie in the tree.
    """
    Path(cache).mkdir(parents=True, exist_ok=True)  # now, because it may change a directory of the tree
    key = hashlib.sha256(os.fsencode(os.path.abspath(directory))).hexdigest()[:16]
    images_file = Path(cache) / f"image-folder-{key}.npy"
    mtimes_file = Path(cache) / f"image-folder-{key}-mtimes.npy"
    cached = _read_cache(images_file, mtimes_file)
    if cached is not None and _unchanged(directory, cached.mtimes):
        return cached
    listing = list_images(directory)
    # The times come last: a listing without its file of times is not used.
    mtimes_file.unlink(missing_ok=True)
    save_array(images_file, listing.images.buffer)
    paths = np.array([os.fsencode(path) for path in listing.mtimes], dtype=np.bytes_)
    times = np.empty(len(paths), dtype=[("directory", paths.dtype), ("mtime_ns", "<i8")])
    times["directory"], times["mtime_ns"] = paths, list(listing.mtimes.values())
    save_array(mtimes_file, times)
    # If the cache lies in the tree, writing it has changed a time that it holds.
    for path, time in listing.mtimes.items():
        if os.path.samefile(os.path.join(directory, path), cache):
            with contextlib.suppress(PermissionError):  # a directory of somebody else: it is listed again next time
                os.utime(cache, ns=(time, time))
    return listing


def _scan(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except PermissionError as error:
        raise PermissionError(f"cannot read the directory {path}: permission denied") from error
    return sorted((entry for entry in found if _exists(entry)), key=lambda entry: entry.name)


def _exists(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir() or entry.is_file()
    except OSError:  # a symbolic link that leads to itself
        return False


def _read_cache(images_file: Path, mtimes_file: Path) -> Listing | None:
    if not (images_file.exists() and mtimes_file.exists()):
        return None
    try:
        times = np.load(mtimes_file)
        mtimes = {os.fsdecode(row["directory"]): int(row["mtime_ns"]) for row in times}
        return Listing(PathList(np.load(images_file, mmap_mode="r")), Counter(), mtimes)
    except (OSError, ValueError, IndexError, KeyError) as error:
        logger.warning("ignoring the unreadable listing %s: %s", images_file, error)
        return None


def _unchanged(directory: str | os.PathLike[str], mtimes: dict[str, int]) -> bool:
    try:
        return all(os.stat(os.path.join(directory, path)).st_mtime_ns == time for path, time in mtimes.items())
    except OSError:
        return False


def read_listing(path: Path, dataset: str, example: str) -> list[str]:
    """Return the lines of a file that lists images, sorted, without blank ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lists nothing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{dataset}: {path} does not exist; it has one line per image, e.g. `{example}`")
    lines = sorted(stripped for line in read_lines(path) if (stripped := line.strip()))
    if not lines:
        raise ValueError(f"{dataset}: {path} is empty; it has one line per image, e.g. `{example}`")
    return lines
