"""Folders of images beside folders of targets: which target belongs to which image.

    ROOT/<images>[/<split>]/any/path/name.jpg
    ROOT/<targets>[/<split>]/any/path/name.png

Notable:
- A target has the path of its image, but for the extension.
- All is checked when the dataset is opened: an image without target, a target without image, or two of one name are
  errors that count and name them. That a target is as large as its image is checked when both are read.
"""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3.data.datasets.decoders import Decoder
from dinov3.data.datasets.extended import BadImageError
from dinov3.data.datasets.listing import EXTENSIONS, list_images
from dinov3.data.datasets.paired import PairedImageDataset, require_root

_SHOWN = 3  # names in an error


class PairedFolderDataset(PairedImageDataset):
    """Images below one folder and a target of the same relative path below another.

    Args:
        root: directory that holds both folders.
        images: folder of the images, in the root.
        targets: folder of the targets, in the root.
        target_name: what errors call a target.
        extensions: of targets, with their dots; they match whatever their case.
        target_decoder: makes the decoder of a target file's bytes; it decodes to something with a size: a PIL image
            or an array [H, W].
        split: folder in both of them; as written, or in lower case.
        transforms: of (image, target); or else
        transform: of the PIL image, and
        target_transform: of the decoded target.

    Raises:
        FileNotFoundError: a folder does not exist, or holds no image.
        ValueError: images and targets do not match one to one; the message counts both and names some.
    """

    def __init__(
        self,
        *,
        root: str,
        images: str,
        targets: str,
        target_name: str,
        extensions: Sequence[str],
        target_decoder: Callable[[bytes], Decoder],
        split: str | None = None,
        transforms: Callable[[Any, Any], Any] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        name = type(self).__name__
        directory = require_root(root, name)
        if Path(images) == Path(targets):
            raise ValueError(f"{name}: images and their targets both lie in {images!r}; give them different folders")
        image_folder = _find_folder(directory, images, split, name)
        target_folder = _find_folder(directory, targets, split, name)
        image_paths = list(list_images(directory / image_folder).images)
        if not image_paths:
            looked_for = f"files ending in {', '.join(EXTENSIONS)} at any depth"
            raise FileNotFoundError(f"{name}: no images in {directory / image_folder}: looked for {looked_for}")
        target_paths = _list_files(directory / target_folder, extensions)
        found = _TwoTrees(directory / image_folder, image_paths, directory / target_folder, target_paths)
        if problems := found.problems(target_name, extensions):
            raise ValueError(f"{name}: {'; '.join(problems)}")
        super().__init__(
            root=str(directory),
            pairs=[(f"{image_folder}/{image}", f"{target_folder}/{target}") for image, target in found.pairs()],
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
            target_decoder=target_decoder,
        )

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{type(self).__name__}: index {index} is out of range for {len(self)} samples")
        index %= len(self)
        image, target = self.load_image(index), self.load_target(index)
        self._check_sizes(index, image, target)
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def _check_sizes(self, index: int, image: Any, target: Any) -> None:
        image_size, target_size = _size_of(image), _size_of(target)
        if image_size == target_size:
            return
        hint = "; a rotation that EXIF data asks for is not applied" if image_size == target_size[::-1] else ""
        raise BadImageError(
            f"{type(self).__name__}: sample {index}: {self._location(index)} has {image_size[0]} x {image_size[1]} "
            f"pixels (width x height), but {os.path.join(str(self.root), self.target_paths[index])} has "
            f"{target_size[0]} x {target_size[1]}: they must be of one size{hint}"
        )


def _size_of(picture: Any) -> tuple[int, int]:
    # Of a PIL image, or of an array [H, W].
    return (picture.shape[1], picture.shape[0]) if hasattr(picture, "shape") else picture.size


def _find_folder(root: Path, folder: str, split: str | None, dataset: str) -> str:
    folder = folder.rstrip("/")
    names = [folder] if not split else [f"{folder}/{split}", f"{folder}/{split.lower()}"]
    for name in names:
        if (root / name).is_dir():
            return name
    parent = root / folder if split and (root / folder).is_dir() else root
    found = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir())
    raise FileNotFoundError(
        f"{dataset}: there is no directory {root / names[0]}; {parent} has "
        + (f"the directories {', '.join(found[:20])}" if found else "no directories")
    )


@dataclass
class _TwoTrees:
    image_directory: Path
    images: list[str]  # relative to it
    target_directory: Path
    targets: list[str]  # relative to it

    def pairs(self) -> list[tuple[str, str]]:
        target_of = {_stem(path): path for path in self.targets}
        return [(path, target_of[_stem(path)]) for path in self.images]

    def problems(self, target_name: str, extensions: Sequence[str]) -> list[str]:
        found = []
        image_stems, target_stems = set(map(_stem, self.images)), set(map(_stem, self.targets))
        if bare := [path for path in self.images if _stem(path) not in target_stems]:
            expected = " or ".join(f"{self.target_directory / _stem(bare[0])}{extension}" for extension in extensions)
            found.append(
                f"{len(bare)} of {len(self.images)} images in {self.image_directory} have no {target_name}: "
                f"{_some(bare)} (expected {expected})"
            )
        if orphans := [path for path in self.targets if _stem(path) not in image_stems]:
            found.append(
                f"{len(orphans)} of {len(self.targets)} {target_name}s in {self.target_directory} have no image: "
                f"{_some(orphans)} (expected {self.image_directory / _stem(orphans[0])}.jpg or another image)"
            )
        for directory, paths in ((self.image_directory, self.images), (self.target_directory, self.targets)):
            if same := _differ_in_extension(paths):
                found.append(f"{_some(same)} in {directory} differ in their extensions alone: keep one of them")
        return found


def _list_files(directory: Path, extensions: Sequence[str]) -> list[str]:
    found = []
    # The listing knows all directories of the tree, but of files only the images.
    for parent in list_images(directory).mtimes:
        with os.scandir(directory / parent) as entries:
            names = [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")]
        found += [f"{parent}/{name}" if parent else name for name in names]
    return sorted(path for path in found if os.path.splitext(path)[1].lower() in extensions)


def _differ_in_extension(paths: Sequence[str]) -> list[str]:
    counts = Counter(map(_stem, paths))
    first = next((stem for stem, count in counts.items() if count > 1), None)
    return [path for path in paths if _stem(path) == first]


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:_SHOWN]) + (", ..." if len(paths) > _SHOWN else "")
