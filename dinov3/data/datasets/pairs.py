"""The bases of datasets whose targets are maps: an image file and a target file per sample."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from PIL import Image

from dinov3.data.datasets.decoders import Decoder, DenseTargetDecoder, ImageDataDecoder
from dinov3.data.datasets.extended import BadImageError, ExtendedVisionDataset, Transforms
from dinov3.data.datasets.files import find_directory, require_directory
from dinov3.data.datasets.listing import EXTENSIONS, list_images
from dinov3.data.images import UPRIGHT, orientation_of_file, turn_upright
from dinov3.utils.messages import list_names


class PairedImageDataset(ExtendedVisionDataset):
    """Images and maps of the same scenes, in two lists of files.

    Args:
        root: directory that the paths are relative to.
        pairs: (image path, target path) of each sample.
        image_decoder: makes the decoder of an image file's bytes.
        target_decoder: makes the decoder of a target file's bytes.
        **transforms: see `Transforms`.

    Attributes:
        image_paths: of all samples, relative to the root.
        target_paths: of all samples, relative to the root.
    """

    has_maps = True

    def __init__(
        self,
        *,
        root: str,
        pairs: Sequence[tuple[str, str]],
        image_decoder: Callable[[Any], Decoder] = ImageDataDecoder,
        target_decoder: Callable[[Any], Decoder] = DenseTargetDecoder,
        **transforms: Unpack[Transforms],
    ) -> None:
        super().__init__(image_decoder=image_decoder, target_decoder=target_decoder, root=root, **transforms)
        self.image_paths = [image for image, _ in pairs]
        self.target_paths = [target for _, target in pairs]

    def get_image_relpath(self, index: int) -> str:
        return self.image_paths[index]

    def get_target(self, index: int) -> bytes:
        """Return the encoded target of sample `index`."""
        return Path(self.root, self.target_paths[index]).read_bytes()

    def load_target(self, index: int) -> Any:
        """Read and decode the target of sample `index`.

        Raises:
            BadImageError: it cannot be read or decoded.
        """
        try:
            return super().load_target(index)
        except Exception as error:
            raise BadImageError(
                f"{type(self).__name__}: cannot read target {index}, {self._target_location(index)}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def load_sample(self, index: int) -> tuple[Any, Any]:
        """Read and decode image and target of sample `index`; a target is turned with its image.

        A target whose size fits only the turned image was drawn on that, and stays as it is.
        """
        image, target = super().load_sample(index)
        if self.reading.exif == "ignore":
            return image, target
        orientation = orientation_of_file(self.get_image_data(index))
        if orientation == UPRIGHT:
            return image, target
        pixels = np.asarray(target)
        turned = turn_upright(pixels, orientation)
        fits_only_as_it_is = _size_of(pixels) == _size_of(image) != _size_of(turned)
        if fits_only_as_it_is:
            return image, target
        return image, Image.fromarray(turned) if isinstance(target, Image.Image) else turned

    def __len__(self) -> int:
        return len(self.image_paths)

    def _target_location(self, index: int) -> str:
        return os.path.join(str(self.root), self.target_paths[index])


class PairedFolderDataset(PairedImageDataset):
    """Images below one folder, and below another a target with the path of each image, except for its extension.

        ROOT/<images>[/<split>]/any/path/name.jpg
        ROOT/<targets>[/<split>]/any/path/name.png

    Everything is checked when the dataset is opened, except that a target is as large as its image: that is checked
    when they are read.

    Args:
        root: directory that holds both folders.
        images: folder of the images, in the root.
        targets: folder of the targets, in the root.
        target_name: what errors call a target.
        extensions: of targets, in any case.
        target_decoder: makes the decoder of a target file's bytes; it decodes to something with a size: a PIL image
            or an array [H, W].
        split: folder in both of them, as written or in lower case.
        **transforms: see `Transforms`.

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
        **transforms: Unpack[Transforms],
    ) -> None:
        name = type(self).__name__
        directory = require_directory(root, name)
        if Path(images) == Path(targets):
            raise ValueError(f"{name}: images and their targets both lie in {images!r}; give them different folders")
        parts = [f"/{split}", f"/{split.lower()}"] if split else [""]
        image_folder, target_folder = (
            find_directory(directory, [folder.rstrip("/") + part for part in parts], name)
            for folder in (images, targets)
        )
        image_paths = _group_by_stem(list_images(directory / image_folder).images)
        target_paths = _group_by_stem(list_images(directory / target_folder, extensions).images)
        if not image_paths:
            looked_for = f"files ending in {', '.join(EXTENSIONS)} at any depth"
            raise FileNotFoundError(f"{name}: no images in {directory / image_folder}: looked for {looked_for}")
        image_side = _Side("images", directory / image_folder, image_paths, "{0}.jpg or another image")
        expected = " or ".join(f"{{0}}.{extension}" for extension in extensions)
        target_side = _Side(f"{target_name}s", directory / target_folder, target_paths, expected)
        if problems := _find_problems(image_side, target_side) + _find_problems(target_side, image_side):
            raise ValueError(f"{name}: {'; '.join(problems)}")
        super().__init__(
            root=str(directory),
            pairs=[
                (f"{image_folder}/{paths[0]}", f"{target_folder}/{target_paths[stem][0]}")
                for stem, paths in image_paths.items()
            ],
            target_decoder=target_decoder,
            **transforms,
        )

    def load_sample(self, index: int) -> tuple[Any, Any]:
        """Read and decode image and target of sample `index`.

        Raises:
            BadImageError: one of them cannot be read or decoded, or they differ in size.
        """
        image, target = super().load_sample(index)
        image_size, target_size = _size_of(image), _size_of(target)
        if image_size != target_size:
            turned = image_size == target_size[::-1] and self.reading.exif == "ignore"
            hint = "; a rotation that EXIF data ask for is not applied (exif=apply)" if turned else ""
            raise BadImageError(
                f"{type(self).__name__}: sample {index}: {self._location(index)} has "
                f"{image_size[0]} x {image_size[1]} pixels (width x height), but {self._target_location(index)} has "
                f"{target_size[0]} x {target_size[1]}: they must have the same size{hint}"
            )
        return image, target


@dataclass
class _Side:
    name: str  # in the plural
    directory: Path
    paths: dict[str, list[str]]  # by path without extension
    expected: str  # what its file is called, from a path without extension {0}


def _group_by_stem(paths: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        groups[os.path.splitext(path)[0]].append(path)
    return groups


def _find_problems(side: _Side, other: _Side) -> list[str]:
    problems = []
    if unmatched := [stem for stem in side.paths if stem not in other.paths]:
        paths = [path for stem in unmatched for path in side.paths[stem]]
        wanted = other.expected.format(unmatched[0])
        problems.append(
            f"{len(paths)} of {sum(map(len, side.paths.values()))} {side.name} in {side.directory} have no "
            f"{other.name.removesuffix('s')}: {list_names(paths, 3)} (expected {wanted} in {other.directory})"
        )
    if same := next((paths for paths in side.paths.values() if len(paths) > 1), None):
        problems.append(f"{list_names(same, 3)} in {side.directory} differ only in their extensions: keep one of them")
    return problems


def _size_of(picture: Any) -> tuple[int, int]:
    # Of a PIL image, or of an array [H, W].
    return (picture.shape[1], picture.shape[0]) if hasattr(picture, "shape") else picture.size
