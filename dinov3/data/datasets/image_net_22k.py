"""ImageNet-22k (ImageNet-21k, "winter 2021") as distributed: one tar per class, never unpacked.

`dump_extra` or `python -m dinov3.data.datasets.dump` lists the members of all tars once, from the block logs that
`tar --list --block-number` wrote, or from the headers of a tar without a log. Images are then read by their offsets
from tars that stay open.
"""

from __future__ import annotations

import gzip
import itertools
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from dinov3.data.datasets.extended import ExtendedVisionDataset, Transforms
from dinov3.data.datasets.files import ExtraFiles, OpenFiles, require_directory
from dinov3.data.datasets.tar import BLOCK, content_of_first_member, iter_files, resolve_links
from dinov3.utils.messages import list_names
from dinov3.utils.text import read_lines

logger = logging.getLogger("dinov3")

UNREADABLE_FILE = "n06470073_47249.JPEG"  # of the published archives
DEFAULT_OPEN_TARS = 16

_GZIP_MAGIC = b"\x1f\x8b"
_LOG_LINE = re.compile(r"block (\d+): (.*)")
_LOG_END = "** Block of NULs **"


class ImageNet22k(ExtendedVisionDataset):
    """ImageNet-22k.

    Args:
        root: directory with `<class id>.tar` and, optionally, `blocks/<class id>.log`, the output of
            `tar --list --block-number --file <class id>.tar`.
        extra: directory of the files that `dump_extra` writes; may be `root`.
        mmap_cache_size: number of tars that each process keeps open.
        **transforms: see `Transforms`; targets are class indices.

    Raises:
        FileNotFoundError: `root` is not a directory. Missing files of `extra` are reported when they are first needed.
    """

    Target = int
    is_benchmark = True

    def __init__(
        self, *, root: str, extra: str, mmap_cache_size: int = DEFAULT_OPEN_TARS, **transforms: Unpack[Transforms]
    ) -> None:
        super().__init__(root=root, **transforms)
        require_directory(root, "ImageNet22k")
        directory = Path(extra).expanduser()
        self._extra = ExtraFiles(
            directory,
            dataset="ImageNet22k",
            dump_string=f"ImageNet22k:root={self.root}:extra={directory}",
            constructor=f"ImageNet22k(root={str(self.root)!r}, extra={str(directory)!r})",
        )
        self._tars = OpenFiles(mmap_cache_size)

    @property
    def classes(self) -> list[str]:
        """All class ids, by class index."""
        return self.get_class_ids().tolist()

    def find_class_id(self, class_index: int) -> str:
        """Return the class id, e.g. `n01440764`, of a class index."""
        return str(self._extra.load("class-ids")[class_index])

    def get_class_id(self, index: int) -> str:
        """Return the class id of sample `index`."""
        return str(self._entries["class_id"][index])

    def get_class_ids(self) -> np.ndarray:
        """Return all class ids, by class index."""
        return np.array(self._extra.load("class-ids"))

    def get_image_relpath(self, index: int) -> str:
        """Return tar and member of sample `index`, as `<class id>.tar/<member>`."""
        entry = self._entries[index]
        return f"{entry['class_id']}.tar/{entry['filename']}"

    def get_image_data(self, index: int) -> bytes:
        entry = self._entries[index]
        start, end = int(entry["start_offset"]), int(entry["end_offset"])
        path = os.path.join(self.root, f"{entry['class_id']}.tar")
        # All blocks of the member are read: how many of them are headers depends on the length of its name.
        blocks = self._tars.read(path, start, end - start)
        if len(blocks) < end - start:
            raise ValueError(
                f"{path} ends early, at byte {start + len(blocks)}: the image takes the bytes {start} to {end}"
            )
        data = content_of_first_member(blocks)
        if data is None:
            raise ValueError(
                f"{path} has no member at byte {start}: it is not the tar that was listed; dump the extra files again"
            )
        # Some images of the published archives are gzipped once more.
        return gzip.decompress(data) if data.startswith(_GZIP_MAGIC) else data

    def load_image(self, index: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # many of these files have odd metadata, which Pillow reports each time
            return super().load_image(index)

    def get_target(self, index: int) -> int:
        """Return the class index of sample `index`."""
        return int(self._entries["class_index"][index])

    def get_targets(self) -> np.ndarray:
        """Return the class indices of all samples, uint32."""
        return np.array(self._entries["class_index"])

    def __len__(self) -> int:
        return len(self._entries)

    def dump_extra(self) -> None:
        """Write the files of `extra` from the block logs and, where one is missing, from the headers of the tar.

        Raises:
            FileNotFoundError: no tar, or no image in them.
            ValueError: a tar ends early or is damaged, or a block log is incomplete.
        """
        class_ids = sorted(path.stem for path in Path(self.root).glob("*.tar"))
        if not class_ids:
            raise FileNotFoundError(f"ImageNet22k: no <class id>.tar in {self.root}")
        rows: list[tuple[int, str, int, int, str]] = []
        for class_index, class_id in enumerate(class_ids):
            path, log = Path(self.root, f"{class_id}.tar"), Path(self.root, "blocks", f"{class_id}.log")
            if log.is_file():
                members = list(_read_block_log(log, path))
            else:
                files = resolve_links(iter_files(path))
                members = [(file.name, file.start, file.end) for file in files if file.target is None]
                if lost := [f"{file.name} -> {file.target}" for file in files if file.target is not None]:
                    text = "ImageNet22k: left out %d links in %s to what it does not have: %s"
                    logger.warning(text, len(lost), path, list_names(lost, 3))
            rows += [(class_index, class_id, start, end, name) for name, start, end in members]
        rows = [row for row in rows if row[-1] != UNREADABLE_FILE]
        if not rows:
            raise FileNotFoundError(f"ImageNet22k: the {len(class_ids)} tars in {self.root} hold no file")
        offset_type = "<u4" if max(end for _, _, _, end, _ in rows) < 2**32 else "<u8"
        id_type = f"<U{max(map(len, class_ids))}"
        dtype = [
            ("class_index", "<u4"),
            ("class_id", id_type),
            ("start_offset", offset_type),  # where the first header of the image begins
            ("end_offset", offset_type),  # where the next member begins
            ("filename", f"<U{max(len(name) for *_, name in rows)}"),
        ]
        self._extra.save({"entries": np.array(rows, dtype=dtype), "class-ids": np.array(class_ids, dtype=id_type)})
        logger.info("wrote %d entries of ImageNet22k to %s", len(rows), self._extra.directory)

    @property
    def _entries(self) -> np.ndarray:
        return self._extra.load("entries")


def _read_block_log(log: Path, tar: Path) -> Iterator[tuple[str, int, int]]:
    blocks = []
    for line in read_lines(log):
        match = _LOG_LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{log}: expected `block <number>: <member>`, found {line!r}")
        blocks.append((int(match[1]) * BLOCK, match[2]))
    if not blocks or blocks[-1][1] != _LOG_END:
        raise ValueError(
            f"{log} ends early: its last line must be `block <number>: {_LOG_END}`; remove it to do without"
        )
    size = tar.stat().st_size
    if blocks[-1][0] > size:
        raise ValueError(f"{tar} ends early, at byte {size}: {log} lists members up to byte {blocks[-1][0]}")
    for (start, name), (end, _) in itertools.pairwise(blocks):
        if not name.endswith("/"):
            yield name, start, end
