"""A dataset without some of its images, which a file lists: those that cannot be read, for example."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from dinov3.data.datasets.extended import ExtendedVisionDataset, Transforms
from dinov3.data.images import ImageReading
from dinov3.utils.messages import list_names
from dinov3.utils.text import read_lines

logger = logging.getLogger("dinov3")

_TAKES_INDEX = ("get_class_name", "get_class_id", "get_captions")


class SkippingDataset(ExtendedVisionDataset):
    """The images of a dataset that a file does not list. Everything else about the dataset stays, classes too.

    Args:
        dataset: without transforms of its own.
        skip: text file with one path per line, as `get_image_relpath` returns them, several joined by `;`;
            `python -m dinov3.data.check` writes such files.
        **transforms: see `Transforms`.

    Attributes:
        dataset: as given.
        kept: int64, index in it of each image.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it lists nothing of the dataset, or all of it.
    """

    def __init__(self, dataset: ExtendedVisionDataset, skip: str, **transforms: Unpack[Transforms]) -> None:
        super().__init__(root=str(dataset.root), **transforms)
        self.dataset = dataset
        self.reading = dataset.reading
        self.has_maps = dataset.has_maps
        self.kept = _find_kept(dataset, [Path(path).expanduser() for path in skip.split(";") if path])
        self.stream = getattr(dataset, "stream", None)
        if self.stream is not None:
            ends = np.searchsorted(self.kept, np.cumsum(self.stream.counts))
            self.stream = self.stream._replace(counts=np.diff(ends, prepend=0))

    def __getattr__(self, name: str) -> Any:
        if "dataset" not in self.__dict__:  # while it is unpickled
            raise AttributeError(name)
        found = getattr(self.dataset, name)
        return (lambda index: found(self._inner(index))) if name in _TAKES_INDEX else found

    def read_images(self, reading: ImageReading) -> None:
        self.dataset.read_images(reading)
        self.reading = self.dataset.reading

    def get_image_data(self, index: int) -> bytes:
        return self.dataset.get_image_data(self._inner(index))

    def get_image_relpath(self, index: int) -> str:
        return self.dataset.get_image_relpath(self._inner(index))

    def get_target(self, index: int) -> Any:
        return self.dataset.get_target(self._inner(index))

    def get_targets(self) -> Any:
        """Return all targets as the dataset gives them, or None without labels.

        Raises:
            ValueError: the labels cannot be used.
        """
        if not hasattr(self.dataset, "get_targets"):
            return [self.get_target(index) for index in range(len(self))]
        targets = self.dataset.get_targets()
        if isinstance(targets, np.ndarray):
            return targets[self.kept]
        return None if targets is None else [targets[index] for index in self.kept.tolist()]

    def load_image(self, index: int) -> Any:
        return self.dataset.load_image(self._inner(index))

    def load_target(self, index: int) -> Any:
        return self.dataset.load_target(self._inner(index))

    def load_sample(self, index: int) -> tuple[Any, Any]:
        return self.dataset.load_sample(self._inner(index))

    def read_ahead(self, indices: Sequence[int], *, restart: bool) -> None:
        """Read and hold images of a dataset that streams; see `WebDataset.read_ahead`."""
        self.dataset.read_ahead(self.kept[list(indices)].tolist(), restart=restart)

    def __len__(self) -> int:
        return len(self.kept)

    def _inner(self, index: int) -> int:
        return int(self.kept[index])


def _find_kept(dataset: ExtendedVisionDataset, files: Sequence[Path]) -> np.ndarray:
    name = type(dataset).__name__
    paths = [dataset.get_image_relpath(index) for index in range(len(dataset))]
    listed: set[str] = set()
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{name}: skip={file} is not a file; it lists one path per line")
        lines = set(read_lines(file)) - {""}
        unknown = sorted(lines.difference(paths))
        if lines and len(unknown) == len(lines):
            raise ValueError(
                f"{name}: skip={file} lists no image of this dataset: it has {list_names(unknown, 2)}, but the images "
                f"have names such as {paths[0]}"
            )
        if unknown:
            logger.warning(
                "%s: %d lines of skip=%s name no image: %s", name, len(unknown), file, list_names(unknown, 3)
            )
        listed |= lines
    kept = np.flatnonzero([path not in listed for path in paths])
    if not len(kept):
        raise ValueError(f"{name}: skip={list_names(files)} lists all {len(paths)} images of this dataset")
    logger.info("%s: %d of %d images are skipped", name, len(paths) - len(kept), len(paths))
    return kept
