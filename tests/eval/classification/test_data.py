"""Labels, subsets and training features of labelled datasets."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dinov3.eval.classification.data import (
    SubsetEx,
    check_test_labels,
    create_class_indices_mapping,
    create_train_dataset_dict,
    extract_features_for_dataset_dict,
    find_class_mapping,
    get_labels,
    open_dataset,
    pad_multilabel_and_collate,
    read_train_labels,
)
from dinov3.eval.classification.metrics import ClassificationMetricType


class ItemsOnly:
    """A dataset that can only be indexed."""

    def __init__(self, targets: Any) -> None:
        self.targets = targets
        self.n_loaded = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        self.n_loaded += 1
        return torch.tensor([float(index), 1.0]), self.targets[index]


class WithTarget(ItemsOnly):
    """A dataset that gives single targets without their images."""

    def get_target(self, index: int) -> Any:
        return self.targets[index]


class WithTargets(WithTarget):
    """A dataset that gives all targets at once."""

    def get_targets(self) -> Any:
        return self.targets


class StandardTransform:
    def target_transform(self, target: int) -> int:
        return 10 - target


@pytest.mark.parametrize("kind", [ItemsOnly, WithTarget, WithTargets])
@pytest.mark.parametrize("targets", [[2, 0, 1, 1], np.array([2, 0, 1, 1], dtype=np.uint32)])
def test_labels_and_those_of_a_subset(kind: Any, targets: Any) -> None:
    dataset = kind(targets)
    assert torch.equal(get_labels(dataset), torch.tensor([2, 0, 1, 1]))
    if kind is not ItemsOnly:
        assert torch.equal(get_labels(SubsetEx(dataset, [3, 0])), torch.tensor([1, 2]))
        assert dataset.n_loaded == 0


def test_target_transform_applies_to_labels_read_without_images() -> None:
    for dataset in (WithTarget([1, 2]), WithTargets([1, 2])):
        dataset.transforms = StandardTransform()  # type: ignore[attr-defined]
        assert get_labels(dataset).tolist() == [9, 8]
        assert get_labels(SubsetEx(dataset, [1])).tolist() == [8]


def test_multi_hot_labels() -> None:
    rows = [[1, 0, 1], [0, 1, 0]]
    for targets in (rows, np.array(rows), [np.array(row) for row in rows]):
        assert get_labels(WithTargets(targets)).tolist() == rows


def test_labels_of_a_large_dataset_are_read_at_once() -> None:
    dataset = WithTargets(np.arange(200_000) % 1000)
    subset = SubsetEx(dataset, list(range(0, 200_000, 2)))
    get_labels(dataset)
    started = time.process_time()
    assert len(get_labels(dataset)) == 200_000 and len(get_labels(subset)) == 100_000
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("targets", [None, [None, None], [[1], [1, 2]], [0.5, 1.5]])
def test_what_is_no_label_is_refused(targets: Any) -> None:
    class Unlabelled(WithTargets):
        def __len__(self) -> int:
            return 2

    with pytest.raises(ValueError, match="Unlabelled"):
        get_labels(Unlabelled(targets))


def test_mapping_of_many_samples_holds_each_once() -> None:
    labels = torch.randint(0, 50, (1000,), generator=torch.Generator().manual_seed(0)) * 2
    mapping = create_class_indices_mapping(labels)
    assert list(mapping) == list(range(0, 100, 2))
    assert all((labels[samples] == c).all() and samples.diff().gt(0).all() for c, samples in mapping.items())
    assert sum(len(samples) for samples in mapping.values()) == 1000


def test_one_means_one_image_and_a_fraction_keeps_at_least_one() -> None:
    dataset = WithTargets(np.array([0] * 10 + [1] * 3))
    for k_or_percent, counts in ((1.0, [1, 1]), (0.5, [5, 1]), (0.01, [1, 1]), (2.9, [2, 2]), (5, [5, 3])):
        subset = create_train_dataset_dict(dataset, True, k_or_percent, 1)[0]
        assert get_labels(subset).bincount().tolist() == counts


def test_without_few_shot_the_only_try_is_the_dataset_itself() -> None:
    dataset = WithTargets([0, 1])
    assert create_train_dataset_dict(dataset) == {0: dataset}


@pytest.mark.parametrize("fraction, counts", [(0.99, [19] * 5), (0.5, [9] * 5)])
def test_fraction_of_rows_with_one_label_each(fraction: float, counts: list[int]) -> None:
    # Rounding draws fewer than asked for, so the second fraction is the larger one, at 0.99 more than all.
    dataset = WithTargets(np.eye(5, dtype=np.int64)[np.arange(95) % 5])
    subset = create_train_dataset_dict(dataset, True, fraction, 1)[0]
    assert get_labels(subset).sum(dim=0).tolist() == counts


def test_tries_share_features_and_keep_their_own_rows() -> None:
    dataset = WithTargets(np.arange(40) % 4)
    tries = create_train_dataset_dict(dataset, True, 6, 3)
    data = extract_features_for_dataset_dict(nn.Identity(), tries, 8, 0)
    assert dataset.n_loaded == len({index for subset in tries.values() for index in subset.indices})
    for name, subset in tries.items():
        assert data[name]["train_features"][:, 0].tolist() == subset.indices
        assert data[name]["train_labels"].tolist() == [index % 4 for index in subset.indices]


def test_collated_lists_stay_integers_when_all_are_empty() -> None:
    _, (index, targets) = pad_multilabel_and_collate([(torch.zeros(1), (4, [])), (torch.zeros(1), (-1, []))])
    assert index.tolist() == [4, -1] and targets.dtype == torch.int64 and targets.shape == (2, 0)


def named(*classes: str) -> Any:
    dataset: Any = ItemsOnly([0])
    dataset.classes = list(classes)
    return dataset


def test_class_that_was_not_trained_is_named() -> None:
    with pytest.raises(ValueError, match=r"1 of the 2 classes of eval.test_dataset are.*'fox'.*'cat', 'dog': give"):
        find_class_mapping(named("cat", "dog"), named("dog", "fox"), 5, "eval.test_dataset")


def test_part_of_the_classes_is_found_by_name(caplog: pytest.LogCaptureFixture) -> None:
    train = named("ant", "bee", "cat", "dog")
    with caplog.at_level("WARNING", logger="dinov3"):
        mapping = find_class_mapping(train, named("bee", "dog"), 5, "eval.test_dataset")
    assert mapping is not None and mapping.tolist() == [1, 3]
    assert "eval.test_dataset has 2 of the 4 training classes" in caplog.text


def test_equal_or_unnamed_classes_need_no_mapping() -> None:
    train = named("cat", "dog")
    assert find_class_mapping(train, named("cat", "dog"), 5, "x") is None
    assert find_class_mapping(train, ItemsOnly([0]), 5, "x") is None
    assert find_class_mapping(ItemsOnly([0]), train, 5, "x") is None


def test_dataset_may_name_its_part_of_the_classes() -> None:
    dataset = named("a", "b")
    dataset.get_imagenet_class_mapping = lambda: np.array([4, 1])
    mapping = find_class_mapping(ItemsOnly([0]), dataset, 5, "x")
    assert mapping is not None and mapping.tolist() == [4, 1]
    with pytest.raises(ValueError, match="x has some of at least 5 classes, but train.dataset has only 4"):
        find_class_mapping(ItemsOnly([0]), dataset, 4, "x")


@pytest.mark.parametrize(
    "metric, targets, message",
    [
        ("MEAN_ACCURACY", [0, 4], "T has class 4, but the classifier has only 4 classes"),
        ("ANY_MATCH_ACCURACY", [[0], [1, 4]], "T has class 4, but the classifier has only 4 classes"),
        ("ANY_MATCH_ACCURACY", [0, 1], "ANY_MATCH_ACCURACY needs a list of classes per image, but T has"),
        ("ANY_MATCH_ACCURACY", [[], []], "no image of T has a class"),
        ("ANY_MATCH_ACCURACY", None, "no labels"),
        ("IMAGENET_C_METRIC", np.array([[4, 0, 1]]), "T has class 4, but the classifier has only 4 classes"),
        ("IMAGENET_C_METRIC", np.array([[1, 0]]), "IMAGENET_C_METRIC needs rows of class, corruption and level"),
        ("MEAN_MULTILABEL_F1", np.array([[1, 0, 1]]), "T has rows of 3 labels, but the classifier has 4 classes"),
    ],
)
def test_test_labels_that_a_classifier_or_metric_cannot_have_are_refused(
    metric: str, targets: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_test_labels(WithTargets(targets), ClassificationMetricType[metric], 4, "T")


@pytest.mark.parametrize("targets", [[[], [3, 0]], np.array([[3, -1], [0, 1]])])
def test_lists_of_classes_that_were_trained_are_accepted(targets: Any) -> None:
    check_test_labels(WithTargets(targets), ClassificationMetricType.ANY_MATCH_ACCURACY, 4, "T")
    check_test_labels(ItemsOnly(targets), ClassificationMetricType.ANY_MATCH_ACCURACY, 4, "T")


@pytest.mark.parametrize(
    ("names", "labels", "reason"),
    [
        (["cat/1.png"], "auto", r"ImageFolder has no labels: .* has only one class folder, 'cat'; with labels=folder"),
        (["cat/1.png", "dog/2.png", "3.png"], "auto", r"1 of 3 images in .* are not in a class folder, e\.g\. 3\.png"),
        (["cat/1.png", "dog/2.png"], "none", "ImageFolder has no labels: labels=none was given"),
        (["cat/1.png", "cat/2.png"], "folder", "all 2 training images are of class 0: .* at least two classes"),
    ],
)
def test_why_a_folder_has_no_labels_is_said(names: list[str], labels: str, reason: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    dataset = open_dataset(f"ImageFolder:root={tmp_path}:labels={labels}", None, "train.dataset")
    for one in (dataset, SubsetEx(dataset, [0])):
        if labels != "folder" or one is dataset:
            with pytest.raises(ValueError, match=reason):
                read_train_labels(one)
