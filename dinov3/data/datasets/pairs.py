"""The bases of datasets whose targets are maps: an image file and a target file per sample."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

from dinov3.data.datasets.decoders import Decoder, DenseTargetDecoder, ImageDataDecoder
from dinov3.data.datasets.extended import BadImageError, ExtendedVisionDataset, Transforms
from dinov3.data.datasets.files import find_directory, require_directory
from dinov3.data.datasets.listing import EXTENSIONS, PathList, list_images
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

    def __init__(
        self,
        *,
        root: str,
        pairs: Sequence[tuple[str, str]],
        image_decoder: Callable[[Any], Decoder] = ImageDataDecoder,
        target_decoder: Callable[[Any], Decoder] = DenseTargetDecoder,
        **transforms: Unpack[Transforms],
    ) -> None:
        super().__init__(
            image_decoder=image_decoder,
            target_decoder=target_decoder,
            root=root,
            **transforms,
        )
        self.image_paths = [image for image, _ in pairs]
        self.target_paths = [target for _, target in pairs]

    def get_image_relpath(self, index: int) -> str:
        return self.image_paths[index]

    def get_target_relpath(self, index: int) -> str:
        """Return the path of the target of sample `index`, relative to the root."""
        return self.target_paths[index]

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
        image_folder, target_folder = (
            find_directory(
                directory, [f"{folder}/{part}" for part in (split, split.lower())] if split else [folder], name
            )
            for folder in (images.rstrip("/"), targets.rstrip("/"))
        )
        found_images = list_images(directory / image_folder).images
        if not len(found_images):
            looked_for = f"files ending in {', '.join(EXTENSIONS)} at any depth"
            raise FileNotFoundError(f"{name}: no images in {directory / image_folder}: looked for {looked_for}")
        found_targets = list_images(directory / target_folder, extensions).images
        _check_pairs(
            name,
            directory / image_folder,
            found_images,
            directory / target_folder,
            found_targets,
            target_name,
            extensions,
        )
        target_of = {_stem(path): path for path in found_targets}
        super().__init__(
            root=str(directory),
            pairs=[(f"{image_folder}/{path}", f"{target_folder}/{target_of[_stem(path)]}") for path in found_images],
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
            hint = "; a rotation that EXIF data asks for is not applied" if image_size == target_size[::-1] else ""
            raise BadImageError(
                f"{type(self).__name__}: sample {index}: {self._location(index)} has "
                f"{image_size[0]} x {image_size[1]} pixels (width x height), but {self._target_location(index)} has "
                f"{target_size[0]} x {target_size[1]}: they must have the same size{hint}"
            )
        return image, target


def _check_pairs(
    dataset: str,
    image_directory: Path,
    images: PathList,
    target_directory: Path,
    targets: PathList,
    target_name: str,
    extensions: Sequence[str],
) -> None:
    image_stems, target_stems = Counter(map(_stem, images)), Counter(map(_stem, targets))
    problems = []
    if unmatched := [path for path in images if _stem(path) not in target_stems]:
        expected = " or ".join(f"{target_directory / _stem(unmatched[0])}.{extension}" for extension in extensions)
        problems.append(
            f"{len(unmatched)} of {len(images)} images in {image_directory} have no {target_name}: "
            f"{list_names(unmatched, 3)} (expected {expected})"
        )
    if unmatched := [path for path in targets if _stem(path) not in image_stems]:
        problems.append(
            f"{len(unmatched)} of {len(targets)} {target_name}s in {target_directory} have no image: "
            f"{list_names(unmatched, 3)} (expected {image_directory / _stem(unmatched[0])}.jpg or another image)"
        )
    for directory, paths, stems in (
        (image_directory, images, image_stems),
        (target_directory, targets, target_stems),
    ):
        repeated = next((stem for stem, count in stems.items() if count > 1), None)
        if same := [path for path in paths if _stem(path) == repeated]:
            problems.append(f"{list_names(same, 3)} in {directory} differ only in their extensions: keep one of them")
    if problems:
        raise ValueError(f"{dataset}: {'; '.join(problems)}")


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _size_of(picture: Any) -> tuple[int, int]:
    # Of a PIL image, or of an array [H, W].
    return (picture.shape[1], picture.shape[0]) if hasattr(picture, "shape") else picture.size
