"""A dataset whose targets carry the index of their sample, so that the results of several processes can be merged."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset


class DatasetWithEnumeratedTargets(Dataset):
    """Item i of `dataset` as (image, (i, target)).

    Args:
        dataset: of length n, with items (image, target).
        pad_dataset: make the length a multiple of `num_replicas` by repeating the first samples with index -1, so that
            every process sees equally many.
        num_replicas: number of processes; needed for padding.

    Raises:
        ValueError: padding without `num_replicas`, or of an empty dataset.
    """

    def __init__(self, dataset: Any, pad_dataset: bool = False, num_replicas: int | None = None) -> None:
        if pad_dataset and (num_replicas is None or num_replicas < 1):
            raise ValueError(f"pad_dataset needs num_replicas of at least 1, got {num_replicas}")
        if pad_dataset and len(dataset) == 0:
            raise ValueError("an empty dataset cannot be padded")
        self._dataset = dataset
        self._size = len(dataset)
        multiple = num_replicas if pad_dataset and num_replicas else 1
        self._padded_size = -(-self._size // multiple) * multiple

    def __len__(self) -> int:
        return self._padded_size

    def __getitem__(self, index: int) -> tuple[Any, tuple[int, Any]]:
        """Return (image, (index, target)), with the index for a target None; for padding (image, (-1, target))."""
        image, target = self._dataset[self._inner(index)]
        if index >= self._size:
            return image, (-1, target)
        return image, (index, index if target is None else target)

    def get_target(self, index: int) -> tuple[int, Any]:
        """Return (index, target), for padding (-1, target)."""
        target = self._dataset.get_target(self._inner(index))
        return (index if index < self._size else -1), target

    def get_image_relpath(self, index: int) -> str:
        """Return the path of the image, relative to the root of the dataset."""
        return self._dataset.get_image_relpath(self._inner(index))

    def _inner(self, index: int) -> int:
        if not 0 <= index < self._padded_size:
            raise IndexError(f"index {index} is out of range for {self._padded_size} samples")
        return index % self._size
