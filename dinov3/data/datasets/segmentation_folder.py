"""Your own images with maps of class indices, as two folders."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Unpack

import numpy as np
from PIL import Image

from dinov3.data.datasets.decoders import DenseTargetDecoder
from dinov3.data.datasets.extended import Transforms
from dinov3.data.datasets.files import require_directory
from dinov3.data.datasets.pairs import PairedFolderDataset
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
        **transforms: see `Transforms`; targets are masks, PIL images of mode L.

    Attributes:
        class_names: by class index; None without `classes.txt`.
        counts_classes_from_zero: True; label 0 is a class like the others.

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
