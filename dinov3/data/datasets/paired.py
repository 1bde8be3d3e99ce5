"""The base of datasets whose targets are maps: an image file and a target file per sample."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dinov3.data.datasets.decoders import Decoder, DenseTargetDecoder, ImageDataDecoder
from dinov3.data.datasets.extended import BadImageError, ExtendedVisionDataset


class PairedImageDataset(ExtendedVisionDataset):
    """Images and maps of the same scene, in two lists of files.

    Args:
        root: directory that the paths are relative to.
        pairs: (image path, target path) of each sample.
        transforms: of (image, target); or else
        transform: of the PIL image, and
        target_transform: of the decoded target.
        image_decoder: makes the decoder of an image file's bytes.
        target_decoder: makes the decoder of a target file's bytes.

    Attributes:
        image_paths: of all samples, relative to the root.
        target_paths: of all samples, relative to the root.
    """

    def __init__(
        self,
        *,
        root: str,
        pairs: Sequence[tuple[str, str]],
        transforms: Callable[[Any, Any], Any] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        image_decoder: Callable[[Any], Decoder] = ImageDataDecoder,
        target_decoder: Callable[[Any], Decoder] = DenseTargetDecoder,
    ) -> None:
        super().__init__(
            image_decoder=image_decoder,
            target_decoder=target_decoder,
            root=root,
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        self.image_paths = [image for image, _ in pairs]
        self.target_paths = [target for _, target in pairs]

    def get_image_relpath(self, index: int) -> str:
        return self.image_paths[index]

    def get_target_relpath(self, index: int) -> str:
        """Path of the target of sample `index`, relative to the root."""
        return self.target_paths[index]

    def get_image_data(self, index: int) -> bytes:
        return Path(self.root, self.image_paths[index]).read_bytes()

    def get_target(self, index: int) -> bytes:
        """The encoded target of sample `index`."""
        return Path(self.root, self.target_paths[index]).read_bytes()

    def load_target(self, index: int) -> Any:
        """The decoded target of sample `index`, without transforms.

        Raises:
            BadImageError: the target cannot be read or decoded.
        """
        try:
            return super().load_target(index)
        except Exception as error:
            raise BadImageError(
                f"{type(self).__name__}: cannot read target {index}, "
                f"{os.path.join(str(self.root), self.target_paths[index])}: {type(error).__name__}: {error}"
            ) from error

    def __len__(self) -> int:
        return len(self.image_paths)


def require_root(root: str | None, dataset: str) -> Path:
    """The directory `root`.

    Raises:
        ValueError: no root was given.
        FileNotFoundError: it is no directory.
    """
    if not root:
        raise ValueError(f"{dataset}: give root=DIRECTORY, where the dataset lies")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{dataset}: root={root!r} is not a directory")
    return path


def read_listing(path: Path, dataset: str, example: str) -> list[str]:
    """The lines of a listing, sorted, without blank ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lists nothing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{dataset}: {path} does not exist; it has one line per image, e.g. `{example}`")
    lines = sorted(stripped for line in path.read_text().splitlines() if (stripped := line.strip()))
    if not lines:
        raise ValueError(f"{dataset}: {path} is empty; it has one line per image, e.g. `{example}`")
    return lines
