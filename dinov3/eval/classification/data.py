"""Labels, few-shot subsets and training features of labelled datasets.

Notable: labels are read without decoding an image wherever the dataset can give them; few-shot tries that overlap share
their features.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate

from dinov3 import distributed
from dinov3.eval.classification.metrics import ClassificationMetricType, TargetKind, check_targets
from dinov3.eval.features.cache import FeatureCache, extract_cached
from dinov3.eval.features.extraction import Spill, gather_rows, take_rows

logger = logging.getLogger("dinov3")


class SubsetEx(Subset[Any]):
    """Some samples of a dataset, whose targets can be read without their images.

    Args:
        dataset: gives (image, target).
        indices: positions in `dataset`, in the order of the subset.
    """

    @property
    def transforms(self) -> Any:
        """The transforms of the dataset."""
        return getattr(self.dataset, "transforms", None)

    def get_target(self, index: int) -> Any:
        """The target of one sample, before target transforms."""
        return self.dataset.get_target(self.indices[index])  # type: ignore[attr-defined]

    def get_targets(self) -> Any:
        """All targets, before target transforms, as the dataset gives them; None if it has no labels."""
        if not hasattr(self.dataset, "get_targets"):
            return [self.get_target(index) for index in range(len(self))]
        targets = self.dataset.get_targets()
        if targets is None or isinstance(targets, np.ndarray | Tensor):
            return None if targets is None else targets[self.indices]
        return [targets[index] for index in self.indices]


def get_target_transform(dataset: Any) -> Any:
    """What the dataset applies to its targets; None if nothing."""
    return getattr(getattr(dataset, "transforms", None), "target_transform", None)


def get_labels(dataset: Any) -> Tensor:
    """The labels of a dataset, by `get_targets()`, else `get_target(i)`, else from the samples.

    Returns:
        int64 [N], or multi-hot [N, L].

    Raises:
        ValueError: the dataset has no labels, or they are not integers of one shape.
    """
    labels = get_labels_without_images(dataset)
    if labels is None:
        labels = _as_labels([dataset[index][1] for index in range(len(dataset))], dataset)
    return labels


def get_labels_without_images(dataset: Any) -> Tensor | None:
    """As `get_labels`, but None if only loading the samples would tell."""
    return _as_labels(_targets_without_images(dataset), dataset) if _tells_targets(dataset) else None


def check_test_labels(
    dataset: Any, metric_type: ClassificationMetricType, num_classes: int, name: str
) -> Tensor | None:
    """Refuse targets that a metric cannot take, or classes that a classifier does not have, before an image is read.

    Args:
        dataset: with targets as the metric wants them.
        metric_type: the metric.
        num_classes: of the classifier, those that are scored.
        name: what messages call the dataset.

    Returns:
        The labels, [N] or [N, L]; None where only loading the samples would tell, and where they are lists or indices.

    Raises:
        ValueError: says what was expected.
    """
    kind = metric_type.target_kind
    if kind is TargetKind.INDICES or not _tells_targets(dataset):
        return None
    if kind is TargetKind.LISTS:
        _check_largest_class(_largest_of_lists(dataset, metric_type, name), num_classes, name)
        return None
    labels = get_labels_without_images(dataset)
    check_targets(metric_type, labels, name)
    assert labels is not None
    if kind is TargetKind.MULTI_HOT:
        if labels.shape[1] != num_classes:
            raise ValueError(
                f"{name} has rows of {labels.shape[1]} labels, but the classifier has {num_classes} classes"
            )
        return labels
    _check_largest_class(int((labels if labels.ndim == 1 else labels[:, 0]).max()), num_classes, name)
    return labels


def get_num_classes(dataset: Any) -> int:
    """The largest label + 1, or the width of multi-hot labels."""
    return _num_classes(get_labels(dataset))


def create_class_indices_mapping(labels: Tensor) -> dict[int, Tensor]:
    """The samples of each class.

    Args:
        labels: int64 [N], or multi-hot [N, L].

    Returns:
        Ascending sample indices (int64) by class; classes in ascending order, only those that occur.
    """
    samples, classes = (torch.arange(len(labels)), labels) if labels.ndim == 1 else labels.nonzero(as_tuple=True)
    order = classes.argsort(stable=True)
    present, counts = classes[order].unique_consecutive(return_counts=True)
    return dict(zip(present.tolist(), samples[order].split(counts.tolist()), strict=True))


def create_train_dataset_dict(
    dataset: Any,
    few_shot_eval: bool = False,
    few_shot_k_or_percent: float | None = None,
    few_shot_n_tries: int = 1,
) -> dict[int, Any]:
    """The training sets of an evaluation, by try.

    Args:
        dataset: the labelled dataset.
        few_shot_eval: draw subsets; otherwise the only try is the whole dataset.
        few_shot_k_or_percent: at least 1: images per class (the integer part; all of a smaller class); below 1:
            fraction of each class, at least one image.
        few_shot_n_tries: number of subsets; try t is drawn with seed t.

    Returns:
        The dataset, or its subsets in ascending order of their samples.
    """
    if not few_shot_eval:
        return {0: dataset}
    if few_shot_k_or_percent is None or few_shot_k_or_percent <= 0:
        raise ValueError(f"few_shot.k_or_percent must be more than 0, not {few_shot_k_or_percent}")
    labels = get_labels(dataset)
    mapping = create_class_indices_mapping(labels)
    subsets = {}
    for seed in range(few_shot_n_tries):
        if few_shot_k_or_percent >= 1:
            chosen = _draw_from_each_class(mapping, seed, count=int(few_shot_k_or_percent))
        else:
            chosen = _draw_from_each_class(mapping, seed, fraction=few_shot_k_or_percent)
            if labels.ndim == 2:
                # A sample with several labels is drawn for each: draw again with a fraction smaller by the overshoot.
                wanted = int(int(labels.sum()) * few_shot_k_or_percent)
                overshoot = int(labels[chosen].sum()) / max(wanted, 1)
                chosen = _draw_from_each_class(mapping, seed, fraction=few_shot_k_or_percent / overshoot)
        subsets[seed] = SubsetEx(dataset, chosen.tolist())
    return subsets


def split_train_val_datasets(
    dataset: Any, split_percentage: float = 0.1, shuffle_train: bool = True
) -> tuple[SubsetEx, SubsetEx]:
    """Divide a dataset into training and validation samples.

    Args:
        dataset: labelled.
        split_percentage: the fraction of each class that goes to validation: at least one sample, but none of a class
            that has only one.
        shuffle_train: take and leave samples in an order drawn with seed 0, instead of their own.

    Returns:
        The training and the validation samples.
    """
    labels = get_labels(dataset)
    order = torch.arange(len(labels))
    if shuffle_train:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    for places in create_class_indices_mapping(labels[order]).values():
        if len(places) > 1:
            is_val[places[: max(1, int(split_percentage * len(places)))]] = True
    return SubsetEx(dataset, order[~is_val].tolist()), SubsetEx(dataset, order[is_val].tolist())


def extract_features_for_dataset_dict(
    model: nn.Module,
    dataset_dict: Mapping[int, Any],
    batch_size: int,
    num_workers: int,
    gather_on_cpu: bool = False,
    *,
    shard_above_bytes: int | None = None,
    cache: FeatureCache | None = None,
    spill: Spill | None = None,
) -> dict[int, dict[str, Tensor]]:
    """The training features of each try; samples that several tries share go through the model once.

    Args:
        model: gives [B, D] for a batch of images.
        dataset_dict: datasets by try, as of `create_train_dataset_dict`.
        batch_size: images per step and process.
        num_workers: of the loader.
        gather_on_cpu: return CPU tensors instead of such on the model's device.
        shard_above_bytes: with several processes, leave each its own rows if all would take more memory than this.
        cache: where features are looked up, and put.
        spill: for features that are too large for memory.

    Returns:
        `{try: {"train_features": float32 [N, D], "train_labels": int64 [N] or [N, L]}}`. Where rows are left to their
        process: its [n, D] features, the labels of all N, and `"train_rows"` (int64 [n]), which of the N it has.
    """
    dataset, positions = _union(dataset_dict)
    rows = extract_cached(
        model,
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        cache=cache,
        on_cpu=gather_on_cpu,
        description="training features",
        spill=spill,
    )
    n_bytes = 4 * len(dataset) * rows.features.shape[1]
    sharded = distributed.get_world_size() > 1 and shard_above_bytes is not None and n_bytes > shard_above_bytes
    if not sharded:
        rows = gather_rows(rows, spill)
    labels = gather_rows(rows._replace(features=rows.features[:, :0])).targets if sharded else rows.targets
    result = {}
    for name, position in positions.items():
        # Where each of the rows here stands in this try, if it is part of it.
        place = torch.full((len(dataset),), -1)
        place[position] = torch.arange(len(position))
        place = place[rows.positions]
        mine = place >= 0
        result[name] = {
            "train_features": rows.features if mine.all() else take_rows(rows.features, mine.nonzero()[:, 0], spill),
            "train_labels": labels[position.to(labels.device)],
        }
        if sharded:
            result[name]["train_rows"] = place[mine].to(labels.device)
    return result


def pad_multilabel_and_collate(batch: Sequence[Any], pad_value: int = -1) -> tuple[Any, tuple[Tensor, Tensor]]:
    """Collate samples whose targets are lists of classes.

    Args:
        batch: items (image, (index, list of classes)).
        pad_value: fills the shorter lists.

    Returns:
        (images, (index int64 [B], targets int64 [B, A])), A the length of the longest list.
    """
    width = max(len(target) for _, (_, target) in batch)
    padded = [[*target, *[pad_value] * (width - len(target))] for _, (_, target) in batch]
    images = default_collate([image for image, _ in batch])
    index = torch.tensor([index for _, (index, _) in batch])
    return images, (index, torch.tensor(padded, dtype=torch.int64).reshape(len(batch), width))


def find_class_mapping(train_dataset: Any, test_dataset: Any, name: str) -> Tensor | None:
    """Which of the training classes a test set has, if it has but a part of them, as ImageNet-R and ImageNet-A do.

    Args:
        train_dataset: with or without `classes`, the names of its classes.
        test_dataset: likewise; or it tells by `get_imagenet_class_mapping()`.
        name: what messages call the test set.

    Returns:
        int64, the training class of each test class: scores are to be reduced to these columns. None if both have the
        same classes, or have no names.

    Raises:
        ValueError: the test set has a class that the training set does not have; names the first.
    """
    mapping = getattr(test_dataset, "get_imagenet_class_mapping", lambda: None)()
    if mapping is not None:
        return torch.as_tensor(mapping, dtype=torch.int64)
    train_names, test_names = (getattr(dataset, "classes", None) for dataset in (train_dataset, test_dataset))
    if train_names is None or test_names is None or list(train_names) == list(test_names):
        return None
    places = {train_name: place for place, train_name in enumerate(train_names)}
    if unknown := [test_name for test_name in test_names if test_name not in places]:
        raise ValueError(
            f"{len(unknown)} of the {len(test_names)} classes of {name} are not in the training set, the first is "
            f"{unknown[0]!r}; the training set has {_first(train_names)}: give both the same class folders"
        )
    logger.warning(
        "%s has %d of the %d training classes: scores of the others are left out", name, len(test_names), len(places)
    )
    return torch.tensor([places[test_name] for test_name in test_names])


def check_class_mapping(mapping: Tensor | None, num_classes: int, name: str) -> None:
    """Refuse a test set that is a part of more classes than were trained.

    Raises:
        ValueError: names both numbers.
    """
    if mapping is not None and int(mapping.max()) >= num_classes:
        raise ValueError(
            f"{name} is a part of {int(mapping.max()) + 1} or more classes, train.dataset has {num_classes}"
        )


def _tells_targets(dataset: Any) -> bool:
    return hasattr(dataset, "get_targets") or hasattr(dataset, "get_target")


def _targets_without_images(dataset: Any) -> Any:
    if hasattr(dataset, "get_targets"):
        targets = dataset.get_targets()
    else:
        targets = [dataset.get_target(index) for index in range(len(dataset))]
    transform = get_target_transform(dataset)
    return targets if targets is None or transform is None else [transform(target) for target in targets]


def _largest_of_lists(dataset: Any, metric_type: ClassificationMetricType, name: str) -> int:
    targets = _targets_without_images(dataset)
    if targets is None:
        raise ValueError(f"{name} has no labels")
    try:
        largest = max((int(label) for target in targets for label in target), default=-1)
    except TypeError as error:
        needed = metric_type.target_kind.value
        raise ValueError(f"{metric_type.name} needs {needed}, but {name} has one class per image") from error
    if largest < 0:
        raise ValueError(f"no image of {name} has a class")
    return largest


def _check_largest_class(largest: int, num_classes: int, name: str) -> None:
    if largest >= num_classes:
        raise ValueError(f"{name} has class {largest}, but the classifier has only {num_classes} classes")


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(map(repr, names[:count])) + (", ..." if len(names) > count else "")


def _as_labels(targets: Any, dataset: Any) -> Tensor:
    name = type(dataset.dataset if isinstance(dataset, Subset) else dataset).__name__
    if targets is None or (len(targets) and any(target is None for target in (targets[0], targets[-1]))):
        raise ValueError(f"the dataset {name} has no labels; an ImageFolder has them if each class has its sub-folder")
    try:
        array = np.stack([np.asarray(t) for t in targets]) if isinstance(targets, list) else np.asarray(targets)
    except ValueError as error:
        raise ValueError(
            f"the labels of {name} are lists of different lengths; expected integers or multi-hot rows"
        ) from error
    if array.dtype.kind not in "iub" or array.ndim > 2:
        raise ValueError(
            f"the labels of {name} are {array.dtype} of shape {array.shape}; expected integers [N] or [N, L]"
        )
    return torch.from_numpy(array.astype(np.int64))


def _num_classes(labels: Tensor) -> int:
    return int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]


def _draw_from_each_class(
    mapping: Mapping[int, Tensor], seed: int, *, count: int | None = None, fraction: float = 0
) -> Tensor:
    # `count` of each class, or else a fraction, which may be more than 1: all.
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for samples in mapping.values():
        n_drawn = max(1, int(fraction * len(samples))) if count is None else count
        chosen.append(samples[torch.randperm(len(samples), generator=generator)[:n_drawn]])
    return torch.cat(chosen).unique()


def _union(dataset_dict: Mapping[int, Any]) -> tuple[Any, dict[int, Tensor]]:
    # One dataset that holds every sample of every try once, and where in it each try finds its own.
    datasets = list(dataset_dict.values())
    if len(datasets) == 1:
        return datasets[0], {name: torch.arange(len(d)) for name, d in dataset_dict.items()}
    if not all(isinstance(d, SubsetEx) and d.dataset is datasets[0].dataset for d in datasets):
        raise ValueError("several training sets must be subsets of one dataset")
    samples = torch.tensor([index for d in datasets for index in d.indices]).unique()
    positions = {name: torch.searchsorted(samples, torch.tensor(d.indices)) for name, d in dataset_dict.items()}
    return SubsetEx(datasets[0].dataset, samples.tolist()), positions
