"""Several datasets, one after the other, as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np

from dinov3.data.datasets.extended import ExtendedVisionDataset, Transforms
from dinov3.data.images import ImageReading


class ConcatenatedDataset(ExtendedVisionDataset):
    """The samples of several datasets in order.

    Class indices are returned if all datasets have the same classes; otherwise an index would mean different things,
    and every target is None. Maps of depth or labels are always returned.

    Args:
        datasets: at least one dataset, without transforms of their own; none may stream.
        **transforms: see `Transforms`.

    Raises:
        ValueError: a dataset streams, or datasets with maps of labels name different classes.

    Attributes:
        classes: those of the datasets if they agree, otherwise None.
        class_names: those of datasets with maps of labels; None if they name none.
        has_objects: whether all targets are object maps.
    """

    def __init__(self, datasets: Sequence[ExtendedVisionDataset], **transforms: Unpack[Transforms]) -> None:
        super().__init__(**transforms)
        self.datasets = list(datasets)
        if any(getattr(dataset, "stream", None) is not None for dataset in self.datasets):
            raise ValueError(
                "datasets with mode=stream cannot be joined by +; give the shards of both to one, as urls=a;b"
            )
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets])
        classes = [getattr(dataset, "classes", None) for dataset in self.datasets]
        self.classes: list[str] | None = classes[0] if all(names == classes[0] for names in classes) else None
        self.has_maps = all(dataset.has_maps for dataset in self.datasets)
        self.has_objects = all(getattr(dataset, "has_objects", False) for dataset in self.datasets)
        self.class_names: list[str] | None = None
        if self.has_maps:
            class_names = [getattr(dataset, "class_names", None) for dataset in self.datasets]
            self.class_names = class_names[0]
            if different := [names for names in class_names if names != class_names[0]]:
                raise ValueError(
                    f"datasets joined by + name different classes, {class_names[0]} and {different[0]}: one index "
                    "would mean both"
                )

    def read_images(self, reading: ImageReading) -> None:
        super().read_images(reading)
        for dataset in self.datasets:
            dataset.read_images(reading)

    def get_image_data(self, index: int) -> bytes:
        dataset, inner = self._find(index)
        return dataset.get_image_data(inner)

    def get_image_relpath(self, index: int) -> str:
        """Return the path of the image of sample `index`, relative to the root of its dataset."""
        dataset, inner = self._find(index)
        return dataset.get_image_relpath(inner)

    def get_target(self, index: int) -> Any:
        """Return the target of sample `index`, or None if the datasets have no or different classes."""
        dataset, inner = self._find(index)
        return None if self.classes is None else dataset.get_target(inner)

    def get_targets(self) -> np.ndarray | None:
        """Return the class indices of all samples, int64, or None if the datasets have no or different classes."""
        if self.classes is None:
            return None
        return np.concatenate([dataset.get_targets() for dataset in self.datasets]).astype(np.int64)

    def load_image(self, index: int) -> Any:
        dataset, inner = self._find(index)
        return dataset.load_image(inner)

    def load_target(self, index: int) -> Any:
        dataset, inner = self._find(index)
        return dataset.load_target(inner) if self.has_maps or self.classes is not None else None

    def load_sample(self, index: int) -> tuple[Any, Any]:
        if not self.has_maps:
            return super().load_sample(index)
        dataset, inner = self._find(index)
        return dataset.load_sample(inner)  # which checks that image and map fit together

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[Any, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.datasets[which], index - (int(self._ends[which - 1]) if which else 0)
