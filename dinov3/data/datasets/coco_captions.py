"""COCO Captions (Chen et al. 2015): images with about five captions each."""

from __future__ import annotations

import json
import logging
import os
import random
from collections import defaultdict
from enum import Enum
from pathlib import Path
from typing import Any, Unpack

from dinov3.data.datasets.extended import ExtendedVisionDataset, Transforms
from dinov3.data.datasets.files import require_directory
from dinov3.utils.text import read_text

logger = logging.getLogger("dinov3")


class CocoCaptionsSplit(Enum):
    """The parts in use: TRAIN of 2014, VAL of 2017."""

    TRAIN = "train"
    VAL = "val"

    @property
    def images(self) -> str:
        """The directory of the images, relative to the root."""
        return {"train": "train2014/train2014", "val": "val2017/val2017"}[self.value]

    @property
    def annotations(self) -> str:
        """The file of the captions, relative to the root."""
        # The release reads VAL's captions from train2017, whose images are not in val2017.
        year = {"train": 2014, "val": 2017}[self.value]
        return f"annotations_trainval{year}/annotations/captions_{self.value}{year}.json"


class CocoCaptions(ExtendedVisionDataset):
    """Images with one of their captions, drawn at each access from Python's global generator.

    A training loader seeds that generator for each sample (`dinov3.data.loaders`), so that the caption, too, depends
    only on the number of the batch and the position in it.

    Args:
        split: one of `CocoCaptions.Split`.
        root: directory with `train2014/train2014/`, `val2017/val2017/` and the annotation files (`Split.annotations`).
        **transforms: see `Transforms`; targets are captions.

    Attributes:
        image_captions: for each image that has captions a dictionary with `id`, `image` (full path) and `captions`
            (list of str).

    Raises:
        FileNotFoundError: the root or the annotation file does not exist.
        ValueError: no root was given, or the annotation file has another format or no captions.
    """

    Split = CocoCaptionsSplit
    is_benchmark = True

    def __init__(self, *, split: CocoCaptionsSplit, root: str | None = None, **transforms: Unpack[Transforms]) -> None:
        directory = require_directory(root, "CocoCaptions")
        super().__init__(root=str(directory), **transforms)
        self.split = CocoCaptionsSplit(split)
        self.image_captions = _read_captions(directory / self.split.annotations, directory / self.split.images)

    def get_image_relpath(self, index: int) -> str:
        return os.path.relpath(self.image_captions[index]["image"], self.root)

    def get_captions(self, index: int) -> list[str]:
        """Return all captions of sample `index`."""
        return list(self.image_captions[index]["captions"])

    def get_target(self, index: int) -> str:
        """Return one caption of sample `index`, drawn from the generator of `random`."""
        return random.choice(self.image_captions[index]["captions"])

    def __len__(self) -> int:
        return len(self.image_captions)


def _read_captions(path: Path, images: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"CocoCaptions: {path} does not exist; it is part of COCO's annotations")
    captions: dict[int, list[str]] = defaultdict(list)
    try:
        content = json.loads(read_text(path))
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        samples = [
            {"id": image["id"], "image": str(images / image["file_name"]), "captions": captions[image["id"]]}
            for image in content["images"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"CocoCaptions: {path} is not a file of COCO captions ({type(error).__name__}: {error}); "
            "expected `images` with `id`, `file_name` and `annotations` with `image_id`, `caption`"
        ) from error
    described = [sample for sample in samples if sample["captions"]]
    if not described:
        raise ValueError(f"CocoCaptions: none of the {len(samples)} images in {path} has a caption")
    if len(described) < len(samples):
        logger.warning(
            "CocoCaptions: %d images in %s have no caption and are left out", len(samples) - len(described), path
        )
    return described
