"""Any directory tree of images, with class folders or without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import numpy as np

from dinov3.data.datasets.extended import ExtendedVisionDataset, Transforms
from dinov3.data.datasets.files import find_directory, require_directory
from dinov3.data.datasets.listing import EXTENSIONS, count_extensions, list_images, list_images_cached

LABELS = ("auto", "folder", "none")


class ImageFolder(ExtendedVisionDataset):
    """All images below a directory; see `list_images` for which files count and their order.

    Args:
        root: the directory.
        split: search `root/<split>` instead (as written, or in lower case).
        labels: `folder`: the first component of an image's path is its class, classes are sorted by name; `none`: no
            labels; `auto`: `folder` if there are two or more such components and no image lies in the directory
            itself, otherwise `none`.
        extra: directory in which to cache the listing, which pays for millions of files.
        **transforms: see `Transforms`; targets are class indices.

    Attributes:
        classes: class names by class index; None without labels.
        why_no_labels: the reason for that, for errors of who needs labels; empty with labels.

    Raises:
        FileNotFoundError: the directory does not exist, or has no images.
        PermissionError: a directory cannot be read.
        ValueError: unknown `labels`, or `labels="folder"` with an image that is not in a folder.
    """

    def __init__(
        self,
        *,
        root: str,
        split: str | None = None,
        labels: str = "auto",
        extra: str | None = None,
        **transforms: Unpack[Transforms],
    ) -> None:
        super().__init__(root=root, **transforms)
        if labels not in LABELS:
            raise ValueError(f"ImageFolder: labels={labels!r} is not one of {', '.join(LABELS)}")
        directory = require_directory(root, "ImageFolder")
        self._prefix = f"{find_directory(directory, [split, split.lower()], 'ImageFolder')}/" if split else ""
        self._directory = directory / self._prefix
        listing = (
            list_images_cached(self._directory, Path(extra).expanduser()) if extra else list_images(self._directory)
        )
        if not len(listing.images):
            n_others, kinds = listing.other_files.total(), count_extensions(listing.other_files)
            raise FileNotFoundError(
                f"ImageFolder: no images in {self._directory}: looked for files ending in {', '.join(EXTENSIONS)} at "
                f"any depth and saw {n_others} other files in {len(listing.mtimes)} directories"
                + (f": {kinds}" if n_others else "")
            )
        self._paths = listing.images
        self.why_no_labels = ""
        self.classes, self._targets = self._find_labels(labels)

    def find_class_name(self, class_index: int) -> str:
        """Return the name of a class index, which is its folder."""
        if self.classes is None:
            raise ValueError(f"ImageFolder: {self._directory} was read without labels, so it has no classes")
        return self.classes[class_index]

    def get_class_name(self, index: int) -> str | None:
        """Return the class name of sample `index`, or None without labels."""
        target = self.get_target(index)
        return None if target is None else self.find_class_name(target)

    def get_image_relpath(self, index: int) -> str:
        return self._prefix + self._paths[index]

    def get_target(self, index: int) -> int | None:
        """Return the class index of sample `index`, or None without labels."""
        return None if self._targets is None else int(self._targets[index])

    def get_targets(self) -> np.ndarray | None:
        """Return the class indices of all samples, int64, or None without labels."""
        return self._targets

    def __len__(self) -> int:
        return len(self._paths)

    def _find_labels(self, labels: str) -> tuple[list[str] | None, np.ndarray | None]:
        if labels == "none":
            self.why_no_labels = "labels=none was given"
            return None, None
        folders = [path.rpartition("/")[0].partition("/")[0] for path in self._paths]
        classes = sorted(set(folders))
        if labels == "auto" and ("" in classes or len(classes) < 2):
            self.why_no_labels = (
                f"{folders.count('')} of {len(folders)} images in {self._directory} are not in a class folder, e.g. "
                f"{self._paths[folders.index('')]}"
                if "" in classes
                else f"{self._directory} has only one class folder, {classes[0]!r}; with labels=folder it is a class"
            )
            return None, None
        if "" in classes:
            raise ValueError(
                f"ImageFolder: labels=folder, but {self._directory / self._paths[folders.index('')]} is not in a class "
                "folder; move it into one, or use labels=none"
            )
        ranks = {name: rank for rank, name in enumerate(classes)}
        return classes, np.array([ranks[folder] for folder in folders], dtype=np.int64)
