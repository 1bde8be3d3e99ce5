"""Your own images with depth maps, as two folders."""

from __future__ import annotations

import math
from functools import partial
from io import BytesIO
from typing import Unpack

import numpy as np

from dinov3.data.datasets.decoders import DenseTargetDecoder
from dinov3.data.datasets.extended import Transforms
from dinov3.data.datasets.pairs import PairedFolderDataset

_NPY = b"\x93NUMPY"  # how every .npy file begins
_DEEP_MODES = ("I;16", "I;16B", "I")


class DepthFolder(PairedFolderDataset):
    """Images and depth maps of the same relative path; maps are returned in metres, however they are stored.

    A map is a 16-bit `.png` whose values divided by `scale` are metres, or a `.npy` of floats [H, W] in metres. Pixels
    without a measurement are 0 in both (in a `.npy` also NaN or infinite) and are returned as 0.

    Args:
        root: directory with the folders of images and maps.
        split: a folder in both, e.g. `train`. Default: everything in them.
        images: folder of the images.
        depth: folder of the maps.
        scale: units of a `.png` per metre, e.g. 1000 for millimetres; `.npy` files are not scaled.
        **transforms: see `Transforms`; targets are maps, float32 [H, W] in metres.

    Attributes:
        depth_in_metres: True; code that divides depth maps by a constant must not divide these.

    Raises:
        FileNotFoundError: a directory does not exist, or holds no image.
        ValueError: images and maps do not match one to one, or `scale` is not a positive number.
    """

    depth_in_metres = True

    def __init__(
        self,
        *,
        root: str,
        split: str | None = None,
        images: str = "images",
        depth: str = "depth",
        scale: float = 1000.0,
        **transforms: Unpack[Transforms],
    ) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"DepthFolder: scale={scale}: expected a positive number, the units per metre")
        self.scale = scale
        super().__init__(
            root=root,
            split=split,
            images=images,
            targets=depth,
            target_name="depth map",
            extensions=("png", "npy"),
            target_decoder=partial(DepthMapDecoder, scale=scale),
            **transforms,
        )


class DepthMapDecoder(DenseTargetDecoder):
    """Decodes the bytes of a depth map to float32 [H, W] in metres, 0 where nothing was measured.

    Args:
        image_data: a grey image of 16 bits, or a `.npy` file of floats [H, W].
        scale: units of an image per metre.
    """

    def __init__(self, image_data: bytes, scale: float = 1000.0) -> None:
        super().__init__(image_data)
        self.scale = scale

    def decode(self) -> np.ndarray:  # type: ignore[override]
        if self.image_data.startswith(_NPY):
            array = np.load(BytesIO(self.image_data), allow_pickle=False)
            if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
                raise ValueError(f"expected floats [height, width] in metres, found {array.dtype} {list(array.shape)}")
            metres = array.astype(np.float32)
        else:
            image = super().decode()
            if image.mode not in _DEEP_MODES:
                raise ValueError(
                    f"expected a grey PNG of 16 bits, whose values divided by scale={self.scale:g} are metres, found "
                    f"an image of mode {image.mode}"
                )
            metres = np.asarray(image).astype(np.float32) / np.float32(self.scale)
        metres = np.where(np.isfinite(metres), metres, np.float32(0))
        if (metres < 0).any():
            raise ValueError(
                f"it has {int((metres < 0).sum())} negative depths, down to {metres.min():g} m; mark pixels without "
                "a measurement by 0"
            )
        return metres
