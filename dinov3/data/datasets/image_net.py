"""ImageNet-1k (Russakovsky et al. 2015) as unpacked from the official archives, or any part of it.

The files of a split are listed once, by `dump_extra` or `python -m dinov3.data.datasets.dump`, into NumPy files. Those
are then memory-mapped, so that no process walks over 1.28 million files again or holds their names.
"""

from __future__ import annotations

import csv
import logging
import re
from enum import Enum
from pathlib import Path
from typing import Unpack

import numpy as np

from dinov3.data.datasets.extended import ExtendedVisionDataset, Transforms
from dinov3.data.datasets.files import ExtraFiles, require_directory
from dinov3.data.datasets.listing import list_images
from dinov3.utils.text import read_lines

logger = logging.getLogger("dinov3")

LABELS_FILE = "labels.txt"
NO_CLASS = np.iinfo(np.uint32).max  # in the column of class indices of TEST


class ImageNetSplit(Enum):
    """The parts of ImageNet-1k; the labels of TEST were never published."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"

    @property
    def length(self) -> int:
        """The number of images of the complete split."""
        return {"train": 1_281_167, "val": 50_000, "test": 100_000}[self.value]

    def get_dirname(self, class_id: str | None = None) -> str:
        """Return the directory of a class, or without one that of the split, relative to the root."""
        return self.value if class_id is None else f"{self.value}/{class_id}"

    def get_image_relpath(self, actual_index: int, class_id: str | None = None) -> str:
        """Return the path of an image relative to the root, from the number in its file name."""
        if self is ImageNetSplit.TEST:
            return f"{self.get_dirname()}/ILSVRC2012_test_{actual_index:08d}.JPEG"
        name = f"{class_id}_{actual_index}" if self is ImageNetSplit.TRAIN else f"ILSVRC2012_val_{actual_index:08d}"
        return f"{self.get_dirname(class_id)}/{name}.JPEG"

    def parse_image_relpath(self, image_relpath: str) -> tuple[str, int]:
        """Return class id and number of an image from its path relative to the root; inverts `get_image_relpath`.

        Raises:
            ValueError: the path does not follow the pattern of the split, or the split is TEST, which has no classes.
        """
        if self is ImageNetSplit.TEST:
            raise ValueError(f"{image_relpath!r}: images of the TEST split have no class")
        number = r"(?P=class_id)_(?P<index>\d+)" if self is ImageNetSplit.TRAIN else r"ILSVRC2012_val_(?P<index>\d{8})"
        match = re.fullmatch(rf"{self.value}/(?P<class_id>[^/]+)/{number}\.JPEG", image_relpath)
        if match is None:
            example = self.get_image_relpath(42, "n01440764")
            raise ValueError(f"{image_relpath!r} is not named like an ImageNet image of {self.name}, e.g. {example!r}")
        return match["class_id"], int(match["index"])


class ImageNet(ExtendedVisionDataset):
    """ImageNet-1k.

    Args:
        split: one of `ImageNet.Split`.
        root: directory with `train/<class id>/`, `val/<class id>/`, `test/` and `labels.txt`, whose lines are
            `class id,class name`.
        extra: directory of the files that `dump_extra` writes; may be `root`.
        **transforms: see `Transforms`; targets are class indices.

    Raises:
        FileNotFoundError: `root` is not a directory. Missing files of `extra` are reported when they are first needed.
    """

    Split = ImageNetSplit
    is_benchmark = True
    Target = int

    def __init__(self, *, split: ImageNetSplit, root: str, extra: str, **transforms: Unpack[Transforms]) -> None:
        super().__init__(root=root, **transforms)
        require_directory(root, "ImageNet")
        self.split = ImageNetSplit(split)
        directory = Path(extra).expanduser()
        self._extra = ExtraFiles(
            directory,
            dataset="ImageNet",
            dump_string=f"ImageNet:root={self.root}:extra={directory}",
            constructor=(
                f"ImageNet(split=ImageNet.Split.{self.split.name}, root={str(self.root)!r}, extra={str(directory)!r})"
            ),
        )

    @property
    def classes(self) -> list[str] | None:
        """Class ids by class index; None for TEST."""
        return None if self.split is ImageNetSplit.TEST else self._load("class-ids").tolist()

    def find_class_id(self, class_index: int) -> str:
        """Return the class id, e.g. `n01440764`, of a class index."""
        return str(self._load("class-ids")[class_index])

    def find_class_name(self, class_index: int) -> str:
        """Return the class name, e.g. `tench`, of a class index."""
        return str(self._load("class-names")[class_index])

    def get_class_id(self, index: int) -> str | None:
        """Return the class id of sample `index`, or None for TEST."""
        return None if self.split is ImageNetSplit.TEST else str(self._entries["class_id"][index])

    def get_class_name(self, index: int) -> str | None:
        """Return the class name of sample `index`, or None for TEST."""
        return None if self.split is ImageNetSplit.TEST else str(self._entries["class_name"][index])

    def get_image_relpath(self, index: int) -> str:
        entry = self._entries[index]
        class_id = None if self.split is ImageNetSplit.TEST else str(entry["class_id"])
        return self.split.get_image_relpath(int(entry["actual_index"]), class_id)

    def get_target(self, index: int) -> int | None:
        """Return the class index of sample `index`, or None for TEST."""
        return None if self.split is ImageNetSplit.TEST else int(self._entries["class_index"][index])

    def get_targets(self) -> np.ndarray | None:
        """Return the class indices of all samples, uint32, or None for TEST."""
        return None if self.split is ImageNetSplit.TEST else np.array(self._entries["class_index"])

    def __len__(self) -> int:
        return len(self._entries)

    def dump_extra(self) -> None:
        """Write the files of `extra`, for TRAIN and VAL from the directory of the split and `labels.txt`.

        Raises:
            FileNotFoundError: the directory of the split or `labels.txt` is missing, or holds no image.
            ValueError: a file is not named like an ImageNet image, or a class id has no row in `labels.txt`.
        """
        if self.split is ImageNetSplit.TEST:
            # The numbers in the file names are consecutive, so that the directory need not be read.
            entries = np.zeros(self.split.length, dtype=_entry_dtype([], []))
            entries["actual_index"] = np.arange(1, len(entries) + 1)
            entries["class_index"] = NO_CLASS
            arrays = {"entries": entries}
        else:
            entries = self._list_entries()
            _, first = np.unique(entries["class_index"], return_index=True)
            class_ids, class_names = entries["class_id"][first], entries["class_name"][first]
            arrays = {"entries": entries, "class-ids": class_ids, "class-names": class_names}
        self._extra.save({f"{kind}-{self.split.name}": array for kind, array in arrays.items()})
        logger.info("wrote %d entries of ImageNet %s to %s", len(entries), self.split.name, self._extra.directory)

    @property
    def _entries(self) -> np.ndarray:
        return self._extra.load(f"entries-{self.split.name}", self._check_length)

    def _load(self, kind: str) -> np.ndarray:
        if self.split is ImageNetSplit.TEST:
            raise AssertionError("the TEST split of ImageNet has no classes")
        return self._extra.load(f"{kind}-{self.split.name}")

    def _check_length(self, path: Path, entries: np.ndarray) -> None:
        # Only a warning, because many people train on a subset.
        name, n_images, n_complete = self.split.name, len(entries), self.split.length
        if n_images != n_complete:
            text = "ImageNet %s has %d images in %s, the complete split has %d"
            logger.warning(text, name, n_images, path, n_complete)

    def _list_entries(self) -> np.ndarray:
        directory = Path(self.root, self.split.get_dirname())
        if not directory.is_dir():
            raise FileNotFoundError(f"ImageNet: the directory {directory} does not exist")
        names = _read_labels(Path(self.root, LABELS_FILE))
        parsed = [
            self.split.parse_image_relpath(self.split.get_dirname(path)) for path in list_images(directory).images
        ]
        if not parsed:
            example = self.split.get_image_relpath(42, "n01440764")
            raise FileNotFoundError(f"ImageNet: no images in {directory}; expected e.g. {example} in {self.root}")
        class_ids = sorted({class_id for class_id, _ in parsed})
        for class_id in class_ids:
            if class_id not in names:
                raise ValueError(f"ImageNet: class {class_id!r} of {directory} has no row in {self.root}/{LABELS_FILE}")
        ranks = {class_id: rank for rank, class_id in enumerate(class_ids)}
        rows = [(number, ranks[class_id], class_id, names[class_id]) for class_id, number in parsed]
        return np.array(rows, dtype=_entry_dtype(class_ids, [names[class_id] for class_id in class_ids]))


def _entry_dtype(class_ids: list[str], class_names: list[str]) -> np.dtype:
    id_width, name_width = (max(map(len, texts), default=0) for texts in (class_ids, class_names))
    # Widths from the texts that are written: NumPy cuts longer ones off without a word.
    return np.dtype(
        [
            ("actual_index", "<u4"),
            ("class_index", "<u4"),
            ("class_id", f"<U{id_width}"),
            ("class_name", f"<U{name_width}"),
        ]
    )


def _read_labels(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"ImageNet: {path} does not exist; its lines are `class id,class name`")
    rows = [row for row in csv.reader(read_lines(path)) if row]
    for row in rows:
        if len(row) != 2:
            raise ValueError(f"{path}: expected `class id,class name` (a name with a comma in quotes), found {row}")
    return dict(rows)
