"""Test sets for classifiers of ImageNet-1k: its validation images with re-assessed labels, and corrupted ones.

A sample of `ImageNetReaL` has a list of classes, which may be empty (arXiv 2006.07159); one of `ImageNetC` has a row of
class, corruption and level (arXiv 1903.12261). The metrics `ANY_MATCH_ACCURACY` and `IMAGENET_C_METRIC` take these.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Unpack

import numpy as np

from dinov3.data.datasets.extended import ExtendedVisionDataset, Transforms
from dinov3.data.datasets.files import require_directory
from dinov3.data.datasets.listing import list_images
from dinov3.utils.text import read_text

_VAL_NAME = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.[^/]+")
_CORRUPTED_NAME = re.compile(r"(?:.*/)?(?P<corruption>[a-z_]+)/(?P<level>[1-5])/(?P<class_name>[^/]+)/[^/]+")


class _ListedImages(ExtendedVisionDataset):
    is_benchmark = True

    def __init__(self, root: str, **transforms: Unpack[Transforms]) -> None:
        super().__init__(root=root, **transforms)
        self._paths = list_images(require_directory(root, type(self).__name__)).images
        if not len(self._paths):
            raise FileNotFoundError(f"{type(self).__name__}: no images in {root}")

    def __len__(self) -> int:
        return len(self._paths)

    def get_image_relpath(self, index: int) -> str:
        return self._paths[index]

    def _match(self, pattern: re.Pattern[str], expected: str) -> list[re.Match[str]]:
        matches = [pattern.fullmatch(path) for path in self._paths]
        for path, match in zip(self._paths, matches, strict=True):
            if match is None:
                raise ValueError(f"{type(self).__name__}: {Path(self.root, path)} is not named like {expected}")
        return [match for match in matches if match is not None]


class ImageNetReaL(_ListedImages):
    """Validation images of ImageNet-1k with all the classes that people see in them.

    Args:
        root: directory of the images, `ILSVRC2012_val_00000001.JPEG` and so on, at any depth.
        labels: the JSON file of the re-assessed labels: for each image, in the order of their numbers, a list of class
            indices.
        **transforms: see `Transforms`.

    Raises:
        FileNotFoundError: the directory or the file does not exist, or there are no images.
        ValueError: an image has another name or no entry, or the file holds something else.
    """

    def __init__(self, *, root: str, labels: str, **transforms: Unpack[Transforms]) -> None:
        super().__init__(root, **transforms)
        lists = _read_lists(Path(labels).expanduser())
        numbers = [int(match[1]) for match in self._match(_VAL_NAME, "ILSVRC2012_val_00000001.JPEG")]
        if not 1 <= min(numbers) <= max(numbers) <= len(lists):
            raise ValueError(f"ImageNetReaL: image number {max(numbers)}, but {labels} has {len(lists)} entries")
        self._targets = [lists[number - 1] for number in numbers]

    def get_target(self, index: int) -> list[int]:
        """Return the classes of sample `index`."""
        return self._targets[index]

    def get_targets(self) -> list[list[int]]:
        """Return the classes of all samples."""
        return self._targets


class ImageNetC(_ListedImages):
    """Corrupted validation images of ImageNet-1k.

    Args:
        root: holds `<corruption>/<level from 1 to 5>/<class>/<image>`, at any depth; classes are sorted by name.
        **transforms: see `Transforms`.

    Attributes:
        corruption_types: names of the corruptions, sorted; targets are positions in it.
        classes: names of the classes, sorted.

    Raises:
        FileNotFoundError: the directory does not exist, or there are no images.
        ValueError: an image lies elsewhere.
    """

    def __init__(self, *, root: str, **transforms: Unpack[Transforms]) -> None:
        super().__init__(root, **transforms)
        matches = self._match(_CORRUPTED_NAME, "fog/1/n01440764/image.JPEG (corruption, level, class)")
        self.corruption_types = sorted({match["corruption"] for match in matches})
        self.classes = sorted({match["class_name"] for match in matches})
        corruption_of = {name: place for place, name in enumerate(self.corruption_types)}
        class_of = {name: place for place, name in enumerate(self.classes)}
        rows = [(class_of[m["class_name"]], corruption_of[m["corruption"]], int(m["level"])) for m in matches]
        self._targets = np.array(rows, dtype=np.int64)

    def get_target(self, index: int) -> np.ndarray:
        """Return (class, corruption, level) of sample `index`, int64 [3]."""
        return self._targets[index]

    def get_targets(self) -> np.ndarray:
        """Return the rows of all samples, int64 [N, 3]."""
        return self._targets


def _read_lists(path: Path) -> list[list[int]]:
    if not path.is_file():
        raise FileNotFoundError(f"ImageNetReaL: labels={path} is not a file")
    try:
        lists = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"ImageNetReaL: labels={path} is not JSON: {error}") from error
    is_lists = isinstance(lists, list) and all(
        isinstance(entry, list) and all(isinstance(label, int) for label in entry) for entry in lists
    )
    if not is_lists:
        raise ValueError(f"ImageNetReaL: labels={path}: expected a list of lists of class indices")
    return lists
