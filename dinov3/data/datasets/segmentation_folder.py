"""Your own images with maps of class indices, as two folders."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from PIL import Image

from dinov3.data.datasets.decoders import DenseTargetDecoder
from dinov3.data.datasets.extended import BadImageError, Transforms
from dinov3.data.datasets.files import require_directory
from dinov3.data.datasets.object_maps import STEP
from dinov3.data.datasets.pairs import PairedFolderDataset
from dinov3.data.images import read_stored
from dinov3.utils.messages import list_names
from dinov3.utils.text import read_text

IGNORED_LABEL = 255
CLASSES_FILE = "classes.txt"

_INDEX_MODES = ("L", "P", "1", "I;16", "I;16B", "I")


class SegmentationFolder(PairedFolderDataset):
    """Images with PNG masks of the same relative path, whose pixels are class indices; 255 is ignored.

    `<root>/classes.txt` may name the classes: one per line, the first line is class 0.

    Args:
        root: directory with the folders of images and masks.
        split: a folder in both, e.g. `train`. Default: everything in them.
        images: folder of the images.
        labels: folder of the masks.
        instances: folder of PNGs (16 bits) of the same relative paths, in which each pixel holds the number of its
            object in the image, or 0. Default: objects are not told apart.
        **transforms: see `Transforms`; targets are masks, PIL images of mode L; with `instances`, object maps
            (`object_maps`), PIL images of mode I.

    Attributes:
        class_names: by class index; None without `classes.txt`.
        counts_classes_from_zero: True; label 0 is a class like the others.
        has_objects: whether targets are object maps.

    Raises:
        FileNotFoundError: a directory does not exist, or holds no image.
        ValueError: images and masks do not match one to one, or `classes.txt` names no classes.
    """

    counts_classes_from_zero = True

    def __init__(
        self,
        *,
        root: str,
        split: str | None = None,
        images: str = "images",
        labels: str = "labels",
        instances: str | None = None,
        **transforms: Unpack[Transforms],
    ) -> None:
        self.class_names = _read_class_names(require_directory(root, "SegmentationFolder") / CLASSES_FILE)
        n_classes = None if self.class_names is None else len(self.class_names)
        super().__init__(
            root=root,
            split=split,
            images=images,
            targets=labels,
            target_name="mask",
            extensions=("png",),
            target_decoder=partial(ClassMaskDecoder, n_classes=n_classes),
            **transforms,
        )
        self.has_objects = instances is not None
        if instances is not None:
            self._find_instances(labels, instances)

    def load_target(self, index: int) -> Any:
        """Read the mask of sample `index`, and which object its pixels belong to.

        Raises:
            BadImageError: a file cannot be read, or the two do not belong together.
        """
        label = super().load_target(index)
        if not self.has_objects:
            return label
        path = Path(self.root, self._instance_paths[index])
        try:
            return Image.fromarray(combine(np.asarray(label), read_stored(path.read_bytes())))
        except Exception as error:
            raise BadImageError(
                f"SegmentationFolder: cannot read the objects of sample {index}, {path}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _find_instances(self, labels: str, instances: str) -> None:
        # Beside each mask, in the other folder.
        self._instance_paths = [instances + path.removeprefix(labels) for path in self.target_paths]
        if missing := [path for path in self._instance_paths if not Path(self.root, path).is_file()]:
            raise ValueError(
                f"SegmentationFolder: {len(missing)} of {len(self)} masks have no file of objects in "
                f"{Path(self.root, instances)}: {list_names(missing, 3)}"
            )


def combine(label: np.ndarray, stored: Image.Image) -> np.ndarray:
    """Make an object map, int32 [H, W], of classes [H, W] and an image of the numbers of objects.

    Raises:
        ValueError: the image is not one of numbers, has another size, 8 bits do not suffice for it, an object has no
            class or several.
    """
    if stored.mode not in _INDEX_MODES:
        raise ValueError(f"it is a colour image (mode {stored.mode}): save the numbers of objects as a 16-bit PNG")
    numbers = np.asarray(stored).astype(np.int32)
    if numbers.shape != label.shape:
        raise ValueError(f"it is {numbers.shape}, the mask {label.shape} (height, width)")
    if stored.mode in ("L", "P") and numbers.max(initial=0) == IGNORED_LABEL:
        raise ValueError(
            "it has 8 bits and the number 255: 8 bits hold at most 254 objects, and larger numbers wrap around; save "
            "it with 16 bits"
        )
    values = label.astype(np.int32) + STEP * numbers
    values[label == IGNORED_LABEL] = IGNORED_LABEL
    found = np.unique(values[numbers > 0])
    owners = found[found != IGNORED_LABEL] // STEP
    if without := sorted(set(np.unique(numbers).tolist()) - set(owners.tolist()) - {0}):
        raise ValueError(f"objects {list_names(without)} have no pixel with a class in the mask")
    several = [number for number, count in zip(*np.unique(owners, return_counts=True), strict=True) if count > 1]
    if several:
        raise ValueError(f"objects {list_names(several)} have pixels of several classes in the mask")
    return values


class ClassMaskDecoder(DenseTargetDecoder):
    """Decodes the bytes of a mask of class indices to a PIL image of mode L.

    Args:
        image_data: a grey image (1, 8 or 16 bits) or one with a palette, whose indices are the classes.
        n_classes: indices from here on, except 255, are an error. Default: any index is allowed.
    """

    def __init__(self, image_data: bytes, n_classes: int | None = None) -> None:
        super().__init__(image_data)
        self.n_classes = n_classes

    def decode(self) -> Image.Image:
        stored = super().decode()
        if stored.mode not in _INDEX_MODES:
            raise ValueError(
                f"it is a colour image (mode {stored.mode}), but a mask holds class indices: save it as a grey or "
                "palette PNG whose pixel values are 0, 1, 2, ..., and 255 for ignored ones"
            )
        indices = np.asarray(stored)
        n_allowed = IGNORED_LABEL if self.n_classes is None else self.n_classes
        unknown = np.unique(indices[(indices >= n_allowed) & (indices != IGNORED_LABEL)]).tolist()
        if unknown:
            known = "" if self.n_classes is None else f" of the {self.n_classes} classes in {CLASSES_FILE}"
            raise ValueError(
                f"class indices {list_names(unknown, 10)}: allowed are 0 to {n_allowed - 1}{known}, and 255 for ignored"
            )
        return Image.fromarray(indices.astype(np.uint8))


def _read_class_names(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    text = read_text(path).rstrip()
    names = [line.strip() for line in text.split("\n")] if text else []
    if not 1 <= len(names) <= IGNORED_LABEL:
        raise ValueError(
            f"SegmentationFolder: {path} names {len(names)} classes; expected one per line, from 1 to {IGNORED_LABEL}"
        )
    if "" in names:
        raise ValueError(
            f"SegmentationFolder: {path}: line {names.index('') + 1} is empty, but each line names a class, the first "
            "one class 0"
        )
    return names
