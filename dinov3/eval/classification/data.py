"""Labelled datasets of the classification evaluations: labels, checks, few-shot subsets and training features.

Notable: labels are read without decoding an image wherever the dataset can give them; few-shot tries that overlap share
their features.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate

from dinov3 import distributed
from dinov3.data import make_classification_eval_transform, make_dataset
from dinov3.data.fingerprint import check_same_on_all_ranks
from dinov3.data.transforms import get_target_transform
from dinov3.eval.classification.config import TransformConfig
from dinov3.eval.classification.metrics import (
    ClassificationMetricType,
    TargetKind,
    build_classification_metric,
    check_targets,
)
from dinov3.eval.features.cache import IN_MEMORY, FeatureStore
from dinov3.eval.features.extraction import extract_cached, gather_rows, gather_targets, take_rows
from dinov3.utils.messages import list_names

logger = logging.getLogger("dinov3")


class SubsetEx(Subset[Any]):
    """Some samples of a dataset, whose targets can be read without their images.

    Args:
        dataset: gives (image, target).
        indices: positions in `dataset`, in the order of the subset.
    """

    @property
    def transforms(self) -> Any:
        """Those of the dataset."""
        return getattr(self.dataset, "transforms", None)

    def get_target(self, index: int) -> Any:
        """The target of one sample, before target transforms."""
        return self.dataset.get_target(self.indices[index])  # type: ignore[attr-defined]

    def get_targets(self) -> Any:
        """All targets, before target transforms, as the dataset gives them; None if it has no labels."""
        if not hasattr(self.dataset, "get_targets"):
            return [self.get_target(index) for index in range(len(self))]
        targets = self.dataset.get_targets()
        if isinstance(targets, np.ndarray | Tensor):
            return targets[self.indices]
        return None if targets is None else [targets[index] for index in self.indices]


@dataclass(frozen=True)
class ScoredDataset:
    """Images on which a classifier is scored, checked against what it was trained on (`make_scored_dataset`).

    Attributes:
        dataset: gives (image, target), targets as the metric needs them.
        metric: what is measured; to be cloned (`build_classification_metric`).
        class_mapping: int64, the training class of each class that is scored; None for all training classes.
        collate_fn: makes batches of images and targets; None for the default.
    """

    dataset: Any
    metric: Any
    class_mapping: Tensor | None
    collate_fn: Any


def make_transform(config: TransformConfig) -> Any:
    """Resize the short side, crop the centre, normalise; warn if the crop is larger or smaller than customary."""
    customary = config.crop_size * config.CUSTOMARY_RATIO
    if abs(config.resize_size - customary) > 1:
        logger.warning(
            f"transform: images are resized to {config.resize_size} for crops of {config.crop_size}; customary is "
            f"{customary:.0f}"
        )
    return make_classification_eval_transform(**asdict(config))


def open_dataset(dataset_str: str, transform: Any, name: str) -> Any:
    """Open a labelled dataset; all ranks call it.

    Raises:
        ValueError: it has no images, or not the same ones on all ranks; names the setting `name`.
    """
    dataset = make_dataset(
        dataset_str=dataset_str, transform=transform, target_transform=get_target_transform(dataset_str)
    )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty")
    check_same_on_all_ranks(dataset, name)
    return dataset


def read_train_labels(dataset: Any) -> Tensor:
    """Return the labels to train on, [N] or [N, L]; raises a ValueError if all images are of one class."""
    labels = get_labels(dataset)
    if labels.ndim == 1 and int(labels.min()) == int(labels.max()):
        raise ValueError(
            f"all {len(labels)} training images are of class {int(labels[0])}: a classifier needs at least two classes"
        )
    return labels


def make_scored_dataset(
    dataset: Any,
    metric_type: ClassificationMetricType,
    *,
    train_dataset: Any,
    num_classes: int,
    name: str,
    train_labels: Tensor | None = None,
) -> ScoredDataset:
    """Check that a trained classifier can be scored on a dataset, before any image is read.

    Args:
        dataset: gives (image, target).
        metric_type: what is measured.
        train_dataset: what the classifier is trained on.
        num_classes: number of training classes.
        name: what messages call the dataset.
        train_labels: if given, classes without a training image get a warning.

    Raises:
        ValueError: the dataset has classes that the training set lacks, or targets that the metric cannot take.
    """
    class_mapping = find_class_mapping(train_dataset, dataset, num_classes, name)
    n_scored = num_classes if class_mapping is None else len(class_mapping)
    labels = check_test_labels(dataset, metric_type, n_scored, name)
    if labels is not None and labels.ndim == 1 and train_labels is not None:
        labels = labels if class_mapping is None else class_mapping[labels]
        untrained = sorted(set(labels.tolist()) - set(train_labels.tolist()))
        if untrained:
            logger.warning(
                f"{name} has {len(untrained)} classes without a training image ({list_names(untrained)}); their images "
                "count as misclassified"
            )
    return ScoredDataset(
        dataset,
        build_classification_metric(metric_type, num_classes=n_scored, dataset=dataset),
        class_mapping,
        collate_fn=pad_multilabel_and_collate if metric_type.target_kind is TargetKind.LISTS else None,
    )


def get_labels(dataset: Any) -> Tensor:
    """Return the labels of a dataset, from `get_targets()`, otherwise `get_target(i)`, otherwise the samples.

    Returns:
        int64 [N], or multi-hot [N, L].

    Raises:
        ValueError: the dataset has no labels, or they are not integers of one shape.
    """
    if _has_separate_targets(dataset):
        return _as_labels(_targets_without_images(dataset), dataset)
    return _as_labels([dataset[index][1] for index in range(len(dataset))], dataset)


def get_num_classes(dataset: Any) -> int:
    """Return the largest label + 1, or the width of multi-hot labels."""
    return count_classes(get_labels(dataset))


def count_classes(labels: Tensor) -> int:
    """Return the largest label + 1 of labels [N], or the width L of multi-hot labels [N, L]."""
    return int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]


def check_test_labels(
    dataset: Any, metric_type: ClassificationMetricType, num_classes: int, name: str
) -> Tensor | None:
    """Refuse targets that a metric cannot take or classes that a classifier does not have, before an image is read.

    Args:
        dataset: with targets as the metric wants them.
        metric_type: the metric.
        num_classes: number of classes that are scored.
        name: what messages call the dataset.

    Returns:
        The labels, [N] or [N, L]; None if only the samples would show them, or if they are lists or indices.

    Raises:
        ValueError: says what was expected.
    """
    kind = metric_type.target_kind
    if kind is TargetKind.INDICES or not _has_separate_targets(dataset):
        return None
    if kind is TargetKind.LISTS:
        labels, largest = None, _largest_of_lists(dataset, metric_type, name)
    else:
        labels = _as_labels(_targets_without_images(dataset), dataset)
        check_targets(metric_type, labels, name)
        if kind is TargetKind.MULTI_HOT:
            if labels.shape[1] != num_classes:
                raise ValueError(
                    f"{name} has rows of {labels.shape[1]} labels, but the classifier has {num_classes} classes"
                )
            return labels
        largest = int((labels if labels.ndim == 1 else labels[:, 0]).max())
    if largest >= num_classes:
        raise ValueError(f"{name} has class {largest}, but the classifier has only {num_classes} classes")
    return labels


def create_class_indices_mapping(labels: Tensor) -> dict[int, Tensor]:
    """Group samples by class.

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
    dataset: Any, few_shot_eval: bool = False, few_shot_k_or_percent: float | None = None, few_shot_n_tries: int = 1
) -> dict[int, Any]:
    """Return the training sets of an evaluation, by try.

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
    store: FeatureStore = IN_MEMORY,
) -> dict[int, dict[str, Tensor]]:
    """Extract the training features of each try; samples that several tries share go through the model once.

    Args:
        model: gives [B, D] for a batch of images.
        dataset_dict: datasets by try, as returned by `create_train_dataset_dict`.
        batch_size: images per step and process.
        num_workers: loader processes.
        gather_on_cpu: return tensors on the CPU instead of the model's device.
        shard_above_bytes: with several processes, each keeps only its own rows if all would take more memory than this.
        store: where features are found, and where they go.

    Returns:
        `{try: {"train_features": float32 [N, D], "train_labels": int64 [N] or [N, L]}}`. If each process keeps its own
        rows: its [n, D] features, the labels of all N, and `"train_rows"` (int64 [n]), which of the N it has.
    """
    dataset, positions = _union(dataset_dict)
    rows = extract_cached(
        model,
        dataset,
        store,
        batch_size=batch_size,
        num_workers=num_workers,
        on_cpu=gather_on_cpu,
        description="training features",
    )
    n_bytes = 4 * len(dataset) * rows.features.shape[1]
    sharded = distributed.get_world_size() > 1 and shard_above_bytes is not None and n_bytes > shard_above_bytes
    if not sharded:
        rows = gather_rows(rows, store)
    labels = gather_targets(rows) if sharded else rows.targets
    result = {}
    for name, position in positions.items():
        # Where each of the rows here stands in this try, if it is part of it.
        place = torch.full((len(dataset),), -1)
        place[position] = torch.arange(len(position))
        place = place[rows.positions]
        mine = place >= 0
        result[name] = {
            "train_features": rows.features if mine.all() else take_rows(rows.features, mine.nonzero()[:, 0], store),
            "train_labels": labels[position.to(labels.device)],
        }
        if sharded:
            result[name]["train_rows"] = place[mine].to(labels.device)
    return result


def pad_multilabel_and_collate(batch: Sequence[Any]) -> tuple[Any, tuple[Tensor, Tensor]]:
    """Collate samples whose targets are lists of classes.

    Args:
        batch: items (image, (index, list of classes)).

    Returns:
        (images, (index int64 [B], targets int64 [B, A])), A the length of the longest list; -1 fills the shorter ones.
    """
    width = max(len(target) for _, (_, target) in batch)
    padded = [[*target, *[-1] * (width - len(target))] for _, (_, target) in batch]
    images = default_collate([image for image, _ in batch])
    index = torch.tensor([index for _, (index, _) in batch])
    return images, (index, torch.tensor(padded, dtype=torch.int64).reshape(len(batch), width))


def find_class_mapping(train_dataset: Any, test_dataset: Any, num_classes: int, name: str) -> Tensor | None:
    """Find which of the training classes a test set has, if it has only some, as ImageNet-R and ImageNet-A do.

    Args:
        train_dataset: has `classes`, the names of its classes, or not; a `Subset` has those of its dataset.
        test_dataset: the same; or it has `get_imagenet_class_mapping()`.
        num_classes: number of training classes.
        name: what messages call the test set.

    Returns:
        int64, the training class of each test class: scores are reduced to these columns. None if both have the same
        classes, or classes without names.

    Raises:
        ValueError: the test set has a class that the training set lacks; names the first.
    """
    train_dataset, test_dataset = (
        dataset.dataset if isinstance(dataset, Subset) else dataset for dataset in (train_dataset, test_dataset)
    )
    train_names, test_names = (getattr(dataset, "classes", None) for dataset in (train_dataset, test_dataset))
    if hasattr(test_dataset, "get_imagenet_class_mapping"):
        mapping = torch.as_tensor(test_dataset.get_imagenet_class_mapping(), dtype=torch.int64)
    elif train_names is None or test_names is None or list(train_names) == list(test_names):
        return None
    else:
        places = {train_name: place for place, train_name in enumerate(train_names)}
        if unknown := [test_name for test_name in test_names if test_name not in places]:
            raise ValueError(
                f"{len(unknown)} of the {len(test_names)} classes of {name} are not in the training set, the first is "
                f"{unknown[0]!r}; the training set has {list_names([*map(repr, train_names)])}: give both the same "
                "class folders"
            )
        logger.warning(
            "%s has %d of the %d training classes: only their scores are compared", name, len(test_names), len(places)
        )
        mapping = torch.tensor([places[test_name] for test_name in test_names])
    if int(mapping.max()) >= num_classes:
        raise ValueError(
            f"{name} has some of at least {int(mapping.max()) + 1} classes, but train.dataset has only {num_classes}"
        )
    return mapping


def _has_separate_targets(dataset: Any) -> bool:
    return hasattr(dataset, "get_targets") or hasattr(dataset, "get_target")


def _targets_without_images(dataset: Any) -> Any:
    if hasattr(dataset, "get_targets"):
        targets = dataset.get_targets()
    else:
        targets = [dataset.get_target(index) for index in range(len(dataset))]
    # `get_targets` gives them as stored; the samples, and so the metrics, have them transformed.
    transform = getattr(getattr(dataset, "transforms", None), "target_transform", None)
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


def _as_labels(targets: Any, dataset: Any) -> Tensor:
    name = type(dataset.dataset if isinstance(dataset, Subset) else dataset).__name__
    if targets is None or (len(targets) and any(target is None for target in (targets[0], targets[-1]))):
        reason = getattr(getattr(dataset, "dataset", dataset), "why_no_labels", "")
        raise ValueError(
            f"the dataset {name} has no labels"
            + (f": {reason}" if reason else "; an ImageFolder has them if each class is a sub-folder")
        )
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


def _draw_from_each_class(
    mapping: Mapping[int, Tensor], seed: int, *, count: int | None = None, fraction: float = 0
) -> Tensor:
    # `count` of each class, or otherwise a fraction; above 1 it means all.
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
