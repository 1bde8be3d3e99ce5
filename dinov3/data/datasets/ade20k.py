"""ADE20K (Zhou et al. 2017), the scene parsing benchmark with 150 classes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from dinov3.data.datasets.decoders import Decoder, DenseTargetDecoder, ImageDataDecoder
from dinov3.data.datasets.files import require_directory
from dinov3.data.datasets.listing import list_images, read_listing
from dinov3.data.datasets.pairs import PairedImageDataset
from dinov3.utils.files import atomic_write

logger = logging.getLogger("dinov3")

_EXAMPLE = "training/ADE_train_00000001.jpg"


class ADE20KSplit(Enum):
    """The published parts of ADE20K."""

    TRAIN = "train"
    VAL = "val"

    @property
    def dirname(self) -> str:
        """The directory of the split, below `images` and `annotations`."""
        return {"train": "training", "val": "validation"}[self.value]

    @property
    def listing(self) -> str:
        """The file of the root that lists the images of the split."""
        return f"ADE20K_object150_{self.value}.txt"


class ADE20K(PairedImageDataset):
    """Images with a map of class indices; 0 is "other".

    Args:
        split: one of `ADE20K.Split`.
        root: directory with `images/`, `annotations/` and a listing `ADE20K_object150_{train,val}.txt`, whose lines are
            paths below `images`; `dump_listing` writes it.
        transforms: applied to (image, target), instead of the next two.
        transform: applied to the PIL image.
        target_transform: applied to the PIL map.
        image_decoder: makes the decoder of an image file's bytes.
        target_decoder: makes the decoder of a target file's bytes.

    Raises:
        FileNotFoundError: the root or the listing does not exist.
        ValueError: no root was given, or the listing is empty.
    """

    Split = ADE20KSplit
    is_benchmark = True

    def __init__(
        self,
        split: ADE20KSplit,
        root: str | None = None,
        transforms: Callable[[Any, Any], Any] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        image_decoder: Callable[[Any], Decoder] = ImageDataDecoder,
        target_decoder: Callable[[Any], Decoder] = DenseTargetDecoder,
    ) -> None:
        directory = require_directory(root, "ADE20K")
        self.split = ADE20KSplit(split)
        lines = read_listing(directory / self.split.listing, "ADE20K", _EXAMPLE)
        super().__init__(
            root=str(directory),
            pairs=[(f"images/{line}", f"annotations/{os.path.splitext(line)[0]}.png") for line in lines],
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
            image_decoder=image_decoder,
            target_decoder=target_decoder,
        )

    @staticmethod
    def dump_listing(split: ADE20KSplit, root: str) -> Path:
        """Write the listing of a split from the files in `<root>/images/{training,validation}`.

        Returns:
            The path of the listing.

        Raises:
            FileNotFoundError: there is no such directory, or no image in it.
        """
        directory = require_directory(root, "ADE20K") / "images" / split.dirname
        if not directory.is_dir():
            raise FileNotFoundError(f"ADE20K: the directory {directory} does not exist")
        images = list_images(directory).images
        if not len(images):
            raise FileNotFoundError(f"ADE20K: no images in {directory}; expected e.g. images/{_EXAMPLE} in {root}")
        path = directory.parents[1] / split.listing
        with atomic_write(path, "w", errors="surrogateescape") as file:  # as `read_listing` reads them
            file.writelines(f"{split.dirname}/{image}\n" for image in images)
        logger.info("wrote %d lines of ADE20K %s to %s", len(images), split.name, path)
        return path
