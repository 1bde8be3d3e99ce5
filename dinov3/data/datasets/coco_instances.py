"""Images with object masks in COCO's format: a folder of images, and a file of annotations."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from PIL import Image

from dinov3.data.datasets.extended import Transforms
from dinov3.data.datasets.object_maps import IGNORED, NOTHING, STEP
from dinov3.data.datasets.pairs import PairedImageDataset
from dinov3.utils.messages import list_names
from dinov3.utils.text import read_text


class CocoInstances(PairedImageDataset):
    """Images whose targets are object maps (`object_maps`), drawn from the annotations of a file in COCO's format.

    Classes are the categories of the file, in the order of their ids. Crowds (`iscrowd`) are regions that do not count.
    Where objects overlap, the smaller one is on top.

    Args:
        images: directory of the images.
        annotations: JSON file with `images`, `annotations` and `categories`, from anywhere.
        **transforms: see `Transforms`; targets are object maps, PIL images of mode I.

    Attributes:
        class_names: by class index.
        counts_classes_from_zero: True; label 0 is a class like the others.
        has_objects: True; targets are object maps.

    Raises:
        ModuleNotFoundError: pycocotools is not installed.
        FileNotFoundError: the directory, the file, or some images that it names do not exist.
        ValueError: the file has another format.
    """

    counts_classes_from_zero = True
    has_objects = True

    def __init__(self, *, images: str, annotations: str, **transforms: Unpack[Transforms]) -> None:
        try:
            import pycocotools.mask  # noqa: F401, used when targets are drawn
        except ImportError as error:
            raise ModuleNotFoundError(
                "CocoInstances needs pycocotools: pip install 'dinov3[instances]'", name="pycocotools"
            ) from error
        directory = Path(images).expanduser()
        if not directory.is_dir():
            raise FileNotFoundError(f"CocoInstances: images={images!r} is not a directory")
        file = Path(annotations).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"CocoInstances: annotations={annotations!r}: there is no such file")
        try:
            content = json.loads(read_text(file))
            categories = sorted(content["categories"], key=lambda category: category["id"])
            class_of = {category["id"]: k for k, category in enumerate(categories)}
            self.class_names = [str(category["name"]) for category in categories]
            names = {image["id"]: str(image["file_name"]) for image in content["images"]}
            self._sizes = [(int(image["height"]), int(image["width"])) for image in content["images"]]
            self._objects: dict[Any, list[dict[str, Any]]] = defaultdict(list)
            for annotation in content["annotations"]:
                one = {"segmentation": annotation["segmentation"], "class": annotation["category_id"]}
                one |= {"is_crowd": bool(annotation.get("iscrowd", 0)), "id": annotation["id"]}
                self._objects[annotation["image_id"]].append(one)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"CocoInstances: {file} is not a file of COCO instances ({type(error).__name__}: {error}); expected "
                "`images` with `id`, `file_name`, `height`, `width`, `annotations` with `id`, `image_id`, "
                "`category_id`, `segmentation`, and `categories` with `id`, `name`"
            ) from error
        if not 1 <= len(categories) <= IGNORED:
            raise ValueError(f"CocoInstances: {file} has {len(categories)} categories, expected 1 to {IGNORED}")
        if unknown := sorted(set(self._objects) - set(names)):
            raise ValueError(
                f"CocoInstances: {file} has annotations of images that it does not list: ids {list_names(unknown)}"
            )
        used = {one["class"] for objects in self._objects.values() for one in objects}
        if unknown := sorted(used - set(class_of)):
            raise ValueError(f"CocoInstances: {file} has annotations of unknown categories: ids {list_names(unknown)}")
        if missing := [name for name in names.values() if not (directory / name).is_file()]:
            raise FileNotFoundError(
                f"CocoInstances: {len(missing)} of {len(names)} images of {file} are not in {directory}: "
                f"{list_names(missing, 3)}"
            )
        self._image_ids = list(names)
        self._class_of = class_of
        super().__init__(
            root=str(directory), pairs=[(name, str(file.absolute())) for name in names.values()], **transforms
        )

    def get_target(self, index: int) -> Any:
        """Return the annotations of sample `index`."""
        return self._objects.get(self._image_ids[index], [])

    def load_target(self, index: int) -> Image.Image:
        """Draw the object map of sample `index`.

        Raises:
            ValueError: a mask cannot be read.
        """
        size = self._sizes[index]
        label = np.full(size, NOTHING, np.int32)
        masks = [(one, self._draw(index, one, size)) for one in self.get_target(index)]
        for one, mask in masks:
            if one["is_crowd"]:
                label[mask] = IGNORED
        # Small objects on top, since they lie before or on large ones. Otherwise in the order of the file.
        objects = sorted((pair for pair in masks if not pair[0]["is_crowd"]), key=lambda pair: -int(pair[1].sum()))
        for number, (one, mask) in enumerate(objects, start=1):
            label[mask] = self._class_of[one["class"]] + STEP * number
        return Image.fromarray(label)

    def load_sample(self, index: int) -> tuple[Any, Any]:
        """Read the image and draw the object map of sample `index`.

        Raises:
            ValueError: they differ in size.
        """
        image, target = super().load_sample(index)
        size = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
        if size != target.size:
            raise ValueError(
                f"CocoInstances: {self._location(index)} has {size[0]} x {size[1]} pixels (width x height), but its "
                f"annotations say {target.size[0]} x {target.size[1]}"
            )
        return image, target

    def _draw(self, index: int, one: dict[str, Any], size: tuple[int, int]) -> np.ndarray[Any, Any]:
        from pycocotools import mask as coco_masks

        shape = one["segmentation"]
        try:
            if isinstance(shape, dict):
                encoded = coco_masks.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape
            else:
                encoded = coco_masks.merge(coco_masks.frPyObjects(shape, *size))
            mask = coco_masks.decode(encoded).astype(bool)
            if mask.shape != size:
                raise ValueError(f"its size is {mask.shape}, that of the image {size} (height, width)")
        except Exception as error:
            raise ValueError(
                f"CocoInstances: cannot read the mask of annotation {one['id']}, {self._location(index)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return mask
