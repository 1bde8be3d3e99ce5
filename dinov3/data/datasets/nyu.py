"""NYU Depth V2 (Silberman et al. 2012): indoor images with depth from a Kinect."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Unpack

from dinov3.data.datasets.decoders import Decoder, DenseTargetDecoder, ImageDataDecoder
from dinov3.data.datasets.extended import Transforms
from dinov3.data.datasets.files import require_directory
from dinov3.data.datasets.listing import read_listing
from dinov3.data.datasets.pairs import PairedImageDataset

_EXAMPLE = "/kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579"


class NYUSplit(Enum):
    """The parts of NYU Depth V2; VAL and TEST are the same images."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"

    @property
    def listing(self) -> str:
        """The file of the root that lists the images of the split."""
        return "nyu_train.txt" if self is NYUSplit.TRAIN else "nyu_test.txt"


class NYU(PairedImageDataset):
    """Images with a map of depths, 16-bit PNG in millimetres.

    Args:
        split: one of `NYU.Split`.
        root: directory with the scenes and the listings `nyu_train.txt` and `nyu_test.txt`, whose lines are
            `<image> <depth> <focal length>`, paths relative to the root.
        image_decoder: makes the decoder of an image file's bytes.
        target_decoder: makes the decoder of a depth file's bytes.
        **transforms: see `Transforms`; targets are PIL images.

    Raises:
        FileNotFoundError: the root or the listing does not exist.
        ValueError: no root was given, or the listing is empty or has a line that names no image and depth.
    """

    Split = NYUSplit
    is_benchmark = True

    def __init__(
        self,
        *,
        split: NYUSplit,
        root: str | None = None,
        image_decoder: Callable[[Any], Decoder] = ImageDataDecoder,
        target_decoder: Callable[[Any], Decoder] = DenseTargetDecoder,
        **transforms: Unpack[Transforms],
    ) -> None:
        directory = require_directory(root, "NYU")
        self.split = NYUSplit(split)
        listing = directory / self.split.listing
        pairs = []
        for line in read_listing(listing, "NYU", _EXAMPLE):
            columns = line.split()
            if len(columns) < 2:
                raise ValueError(f"NYU: {listing}: expected a line such as `{_EXAMPLE}`, found {line!r}")
            pairs.append((columns[0].strip("/"), columns[1].strip("/")))
        super().__init__(
            root=str(directory),
            pairs=pairs,
            image_decoder=image_decoder,
            target_decoder=target_decoder,
            **transforms,
        )
