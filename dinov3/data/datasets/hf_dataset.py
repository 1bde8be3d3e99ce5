"""Images of a Hugging Face `datasets` table: a directory that `save_to_disk` wrote, image files, Parquet, or the Hub.

The package `datasets` is imported when such a dataset is opened.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Unpack

import numpy as np

from dinov3.data.datasets.extended import NO_LABEL, ExtendedVisionDataset, Transforms, all_or_no_labels

logger = logging.getLogger("dinov3")

DEFAULT_SPLIT = "train"
DEFAULT_LABEL = "label"

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAVED = ("state.json", "dataset_dict.json")


class UnusableLabelsError(ValueError):
    """Labels that are not class indices; the message names the column."""


class HFDataset(ExtendedVisionDataset):
    """One split of a Hugging Face dataset.

    Args:
        path: a directory that `save_to_disk` wrote, or one of image or Parquet files; if there is no such directory, a
            name on the Hub, from which it is downloaded.
        split: which split, if there are several.
        image: the column of images, decoded like those of all datasets, not by `datasets`.
        label: the column of class indices; empty for no labels. Default: `label`, if there is such a column; if that
            holds something else, the images can be read, but `get_targets` raises an error.
        **transforms: see `Transforms`; targets are class indices.

    Attributes:
        classes: class names by class index; None if the column has no names.

    Raises:
        ModuleNotFoundError: the package `datasets` is not installed.
        FileNotFoundError: `path` does not exist, or has no data.
        ValueError: a split or column does not exist, a column has another type, or the table is damaged.
    """

    def __init__(
        self,
        *,
        path: str,
        split: str = DEFAULT_SPLIT,
        image: str = "image",
        label: str | None = None,
        **transforms: Unpack[Transforms],
    ) -> None:
        super().__init__(root=path, **transforms)
        package = _import_datasets()
        table = _open(package, str(self.root) if os.path.exists(self.root) else path, split)
        self._image = image
        self._images = _image_column(package, table, image, path)
        self.classes, self._labels, self._label_problem = None, None, None
        try:
            self.classes, self._labels = _label_column(package, table, label, path)
        except UnusableLabelsError as error:
            if label is not None:
                raise
            # A training without labels does not need them; whoever asks for them gets the error.
            self._label_problem = str(error)
            logger.info("%s; the images are read without labels", error)
        if not len(self):
            raise FileNotFoundError(f"HFDataset: {path} (split {split}) has no rows")

    def get_image_relpath(self, index: int) -> str:
        """Return the path that the table has for the image of row `index`, or `row <index>`."""
        return self._cell(index)["path"].as_py() or f"row {index}"

    def get_image_data(self, index: int) -> bytes:
        cell = self._cell(index)
        data, path = cell["bytes"].as_py(), cell["path"].as_py()
        if data is None and path is None:
            raise ValueError(f"row {index} has no image")
        return Path(path).read_bytes() if data is None else data

    def get_target(self, index: int) -> int | None:
        """Return the class index of row `index`, or None without a label."""
        label = NO_LABEL if self._labels is None else int(self._labels[index])
        return None if label == NO_LABEL else label

    def get_targets(self) -> np.ndarray | None:
        """Return the class indices of all rows, int64, or None without labels.

        Raises:
            ValueError: some rows have a label and some have none, or the column `label` does not hold class indices.
        """
        if self._label_problem is not None:
            raise UnusableLabelsError(self._label_problem)
        return None if self._labels is None else all_or_no_labels(self._labels, "HFDataset", self.get_image_relpath)

    def get_class_name(self, index: int) -> str | None:
        """Return the class name of row `index`, or None without a label."""
        target = self.get_target(index)
        if target is None:
            return None
        if self.classes is None:
            raise ValueError(f"HFDataset: the labels of {self.root} have no names")
        return self.classes[target]

    def __len__(self) -> int:
        return len(self._images)

    def _cell(self, index: int) -> Any:
        # An Arrow value: nothing of it is copied or opened before it is asked for.
        cell = self._images[index].column(self._image)[0]
        if not cell.is_valid:
            raise ValueError(f"row {index} has no image")
        return cell

    def _location(self, index: int) -> str:
        try:
            return os.path.join(str(self.root), self.get_image_relpath(index))
        except ValueError:
            return f"{self.root}, row {index}"


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ModuleNotFoundError(
            "HFDataset needs the package `datasets`, which is not installed: pip install datasets", name="datasets"
        ) from error
    return datasets


def _open(package: ModuleType, path: str, split: str) -> Any:
    if any(os.path.isfile(os.path.join(path, name)) for name in _SAVED):
        found = _load(package, package.load_from_disk, path)
    elif os.path.isdir(path):
        offline = package.DownloadConfig(local_files_only=True)
        found = _load(package, package.load_dataset, path, download_config=offline)
    elif path.startswith((".", "~")) or not _HUB_NAME.fullmatch(path):
        raise FileNotFoundError(f"HFDataset: the directory {path} does not exist, and it is not a name on the Hub")
    else:
        logger.info("HFDataset: %s is not a directory; asking the Hub for it", path)
        found = _load(package, package.load_dataset, path)
    return _choose_split(package, found, path, split)


def _load(package: ModuleType, load: Callable[..., Any], path: str, **options: Any) -> Any:
    try:
        return load(path, **options)
    except (FileNotFoundError, package.exceptions.DatasetsError) as error:
        where = (
            "has no data that `datasets` can read" if os.path.isdir(path) else "is neither a directory nor on the Hub"
        )
        raise FileNotFoundError(f"HFDataset: {path} {where}: {error}") from error
    except Exception as error:  # of Arrow, the file system or Python, depending on the damage
        raise ValueError(f"HFDataset: `datasets` cannot open {path}: {type(error).__name__}: {error}") from error


def _choose_split(package: ModuleType, found: Any, path: str, split: str) -> Any:
    if not isinstance(found, package.DatasetDict):
        own = None if found.split is None else str(found.split)
        if split not in (DEFAULT_SPLIT, own):
            raise ValueError(f"HFDataset: {path} is a single table (split {own}), it has no split {split!r}")
        return found
    for name in (split, split.lower()):  # dataset strings may write TRAIN
        if name in found:
            return found[name]
    raise ValueError(f"HFDataset: {path} has no split {split!r}; it has {', '.join(sorted(found))}")


def _image_column(package: ModuleType, table: Any, image: str, path: str) -> Any:
    feature = _feature(table, image, "image", path)
    # Tables from other tools have the encoded bytes, or paths, in plain columns.
    encoded = isinstance(feature, package.Image) or (
        isinstance(feature, package.Value) and feature.dtype in ("binary", "large_binary", "string", "large_string")
    )
    if not encoded:
        raise ValueError(
            f"HFDataset: the column {image!r} of {path} holds {feature}, not images: "
            "expected encoded images (`datasets.Image`, binary) or paths"
        )
    return table.select_columns([image]).cast_column(image, package.Image(decode=False)).with_format("arrow")


def _label_column(
    package: ModuleType, table: Any, label: str | None, path: str
) -> tuple[list[str] | None, np.ndarray | None]:
    if label == "" or (label is None and DEFAULT_LABEL not in table.column_names):
        return None, None
    column = DEFAULT_LABEL if label is None else label
    feature = _feature(table, column, "label", path)
    named = isinstance(feature, package.ClassLabel)
    if not named and not (isinstance(feature, package.Value) and re.fullmatch(r"u?int\d+", feature.dtype)):
        raise UnusableLabelsError(
            f"HFDataset: the column {column!r} of {path} holds {feature}, not class indices: expected integers or a "
            "`ClassLabel`; name another column with label=, or use an empty label= for none"
        )
    values = table.select_columns([column]).with_format("arrow")[:].column(column)
    labels = values.fill_null(NO_LABEL).to_numpy().astype(np.int64)
    return list(feature.names) if named else None, labels


def _feature(table: Any, column: str, key: str, path: str) -> Any:
    if column not in table.column_names:
        raise ValueError(
            f"HFDataset: {path} has no column {column!r}; name one with {key}=: it has {', '.join(table.column_names)}"
        )
    return table.features[column]
