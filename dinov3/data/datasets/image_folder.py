"""Any directory tree of images, with class folders or without labels."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.data.datasets.extended import ExtendedVisionDataset
from dinov3.data.datasets.listing import EXTENSIONS, Listing, list_images, list_images_cached

logger = logging.getLogger("dinov3")

LABELS = ("auto", "folder", "none")


class ImageFolder(ExtendedVisionDataset):
    """All images below a directory; see `list_images` for which files count and their order.

    Args:
        root: the directory.
        split: search `root/<split>` instead (as written, or in lower case).
        labels: `folder`: the first component of an image's path is its class, classes are sorted by name; `none`: no
            labels; `auto`: `folder` if there are two or more such components and no image lies in the directory
            itself, else `none`.
        extra: directory where the listing is cached; worth giving for millions of files.
        transforms: of (image, target); or else
        transform: of the PIL image, and
        target_transform: of the class index.

    Attributes:
        classes: class names by class index, None without labels.

    Raises:
        FileNotFoundError: no such directory, or no image in it.
        PermissionError: a directory cannot be read.
        ValueError: unknown `labels`, or `labels="folder"` with an image that lies in no folder.
    """

    def __init__(
        self,
        *,
        root: str,
        split: str | None = None,
        labels: str = "auto",
        extra: str | None = None,
        transforms: Callable[[Any, Any], Any] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(root=root, transforms=transforms, transform=transform, target_transform=target_transform)
        if labels not in LABELS:
            raise ValueError(f"ImageFolder: labels={labels!r} is not one of {', '.join(LABELS)}")
        self._prefix = _find_split(Path(self.root), split)
        self._directory = Path(self.root, self._prefix)
        cache = Path(extra).expanduser() if extra else None
        listing = list_images(self._directory) if cache is None else list_images_cached(self._directory, cache)
        if not len(listing.images):
            raise FileNotFoundError(_no_images(self._directory, listing))
        self._paths = listing.images
        self.classes, self._targets = self._label(labels)

    def find_class_id(self, class_index: int) -> str:
        """The folder of a class index."""
        return self._require_classes()[class_index]

    def find_class_name(self, class_index: int) -> str:
        """The name of a class index: its folder."""
        return self._require_classes()[class_index]

    def get_class_id(self, index: int) -> str | None:
        """The folder of the class of sample `index`; None without labels."""
        return self.get_class_name(index)

    def get_class_name(self, index: int) -> str | None:
        """The class name of sample `index`; None without labels."""
        target = self.get_target(index)
        return None if target is None else self.find_class_name(target)

    def get_image_relpath(self, index: int) -> str:
        return self._prefix + self._paths[index]

    def get_image_data(self, index: int) -> bytes:
        return Path(self.root, self.get_image_relpath(index)).read_bytes()

    def get_target(self, index: int) -> int | None:
        """The class index of sample `index`; None without labels."""
        return None if self._targets is None else int(self._targets[index])

    def get_targets(self) -> np.ndarray | None:
        """The class indices of all samples, int64; None without labels."""
        return self._targets

    def __len__(self) -> int:
        return len(self._paths)

    def _label(self, labels: str) -> tuple[list[str] | None, np.ndarray | None]:
        if labels == "none":
            return None, None
        loose = next((path for path in self._paths if "/" not in path), None)
        if loose is not None and labels == "folder":
            raise ValueError(
                f"ImageFolder: labels=folder, but {self._directory / loose} lies in no class folder; move it into one, "
                "or use labels=none"
            )
        if loose is not None:
            return None, None
        folders = [path.partition("/")[0] for path in self._paths]
        classes = sorted(set(folders))
        if len(classes) < 2 and labels == "auto":
            return None, None
        ranks = {name: rank for rank, name in enumerate(classes)}
        return classes, np.array([ranks[folder] for folder in folders], dtype=np.int64)

    def _require_classes(self) -> list[str]:
        if self.classes is None:
            raise ValueError(f"ImageFolder: {self._directory} was read without labels, so it has no classes")
        return self.classes


def _find_split(root: Path, split: str | None) -> str:
    if not root.is_dir():
        raise FileNotFoundError(f"ImageFolder: root={str(root)!r} is not a directory")
    if not split:
        return ""
    for name in (split, split.lower()):
        if (root / name).is_dir():
            return f"{name}/"
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    raise FileNotFoundError(
        f"ImageFolder: split={split!r}: no directory {root / split}; {root} has "
        + (", ".join(found[:20]) if found else "no directories")
    )


def _no_images(directory: Path, listing: Listing) -> str:
    return (
        f"ImageFolder: no images in {directory}: looked for files ending in {', '.join(EXTENSIONS)} at any depth "
        f"and saw {listing.n_other_files} other files in {len(listing.mtimes)} directories"
    )
