"""The real images that lie inside installed packages: photos, scanned digits, faces. Nothing is downloaded.

scikit-image lists more images than its wheel holds and would download the others; here files are looked up on the disk,
and those that a version of a package lacks are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dinov3.demo.trees import package_directory


@dataclass(frozen=True)
class Photo:
    """A photo inside a package.

    Attributes:
        name: its short name.
        package: the package that holds it.
        file: its path in the package.
        credit: who made it, and under which terms, as the package says.
        mark: a point to compare the rest of the photo with, as shares of width and height; photos with a mark are shown
            in the figures.
        is_held_out: shown in the figures, but never trained on.
    """

    name: str
    package: str
    file: str
    credit: str
    mark: tuple[float, float] | None = None
    is_held_out: bool = False


_SKIMAGE = "skimage"
_NO_LICENCE = "licence not stated in scikit-image"
PHOTOS = (
    Photo("chelsea", _SKIMAGE, "data/chelsea.png", "Stefan van der Walt, CC0", (0.365, 0.40), is_held_out=True),
    Photo("coffee", _SKIMAGE, "data/coffee.png", "Rachel Michetti, CC0", (0.25, 0.68), is_held_out=True),
    Photo("china", "sklearn", "datasets/images/china.jpg", "danielbuechele, CC BY 2.0", (0.31, 0.38), is_held_out=True),
    Photo("flower", "sklearn", "datasets/images/flower.jpg", "vultilion, CC BY 2.0", (0.48, 0.50)),
    Photo("astronaut", _SKIMAGE, "data/astronaut.png", "NASA, public domain", (0.22, 0.74)),
    Photo("motorcycle", _SKIMAGE, "data/motorcycle_left.png", f"Middlebury 2014, {_NO_LICENCE}", (0.70, 0.60)),
    Photo("motorcycle_right", _SKIMAGE, "data/motorcycle_right.png", f"Middlebury 2014, {_NO_LICENCE}"),
    Photo("rocket", _SKIMAGE, "data/rocket.jpg", "SpaceX, public domain"),
    Photo("hopper", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "US Navy, as shipped with Matplotlib"),
    Photo("retina", _SKIMAGE, "data/retina.jpg", "CC0"),
    Photo("tissue", _SKIMAGE, "data/ihc.png", "no known restrictions"),
    Photo("hubble", _SKIMAGE, "data/hubble_deep_field.jpg", "NASA, public domain"),
    Photo("camera", _SKIMAGE, "data/camera.png", "Lav Varshney, CC0"),
    Photo("brick", _SKIMAGE, "data/brick.png", "CC0"),
    Photo("grass", _SKIMAGE, "data/grass.png", "CC0"),
    Photo("gravel", _SKIMAGE, "data/gravel.png", "CC0"),
    Photo("coins", _SKIMAGE, "data/coins.png", "no known restrictions"),
    Photo("moon", _SKIMAGE, "data/moon.png", _NO_LICENCE),
)


def find_photos() -> list[tuple[Photo, Path]]:
    """Find the photos of `PHOTOS` that are on this disk.

    Returns:
        Each with its path.

    Raises:
        ModuleNotFoundError: a package that holds photos is not installed.
    """
    found = [(photo, package_directory(photo.package) / photo.file) for photo in PHOTOS]
    return [(photo, path) for photo, path in found if path.is_file()]


def load_digits() -> tuple[list[Image.Image], np.ndarray]:
    """Load the 1797 scanned digits of scikit-learn.

    Returns:
        Grey images of 8 x 8 pixels, and their labels, int64 [1797] in 0..9.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(image) for image in pixels], digits.target.astype(np.int64)


def load_faces() -> tuple[list[Image.Image], np.ndarray]:
    """Load the 200 grey images of 25 x 25 pixels that scikit-image has of Labeled Faces in the Wild.

    Returns:
        The images (none if this version of scikit-image has no such file), and labels, int64: 1 face, 0 not a face.
    """
    path = package_directory(_SKIMAGE) / "data" / "lfw_subset.npy"
    if not path.is_file():
        return [], np.zeros(0, dtype=np.int64)
    pixels = np.rint(np.load(path) * 255).astype(np.uint8)
    # As the package documents: first the faces, then as many images of other things.
    labels = (np.arange(len(pixels)) < len(pixels) // 2).astype(np.int64)
    return [Image.fromarray(image) for image in pixels], labels
