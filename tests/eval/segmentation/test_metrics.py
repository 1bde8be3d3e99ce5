from __future__ import annotations

import logging
import math

import pytest
import torch

from dinov3.eval.segmentation.metrics import (
    SEGMENTATION_METRICS,
    calculate_intersect_and_union,
    calculate_segmentation_metrics,
    preprocess_nonzero_labels,
    total_area_to_metrics,
)

ALL = ["mIoU", "dice", "fscore"]


def areas_of(pred: list[int], label: list[int], num_classes: int = 4, **options: object) -> torch.Tensor:
    return calculate_intersect_and_union(torch.tensor(pred), torch.tensor(label), num_classes, **options)


def test_areas_are_counts_over_labelled_pixels() -> None:
    areas = areas_of([0, 0, 1, 1, 2, 3], [0, 1, 1, 255, 2, 255], 4)
    assert areas.dtype == torch.int64
    assert areas.tolist() == [[1, 1, 1, 0], [2, 2, 1, 0], [2, 1, 1, 0], [1, 2, 1, 0]]


def test_ids_that_are_no_class_are_not_counted() -> None:
    areas = areas_of([0, 9, 9, -1], [9, 0, 9, 1], 2)
    assert areas.tolist() == [[0, 0], [2, 1], [1, 0], [1, 1]]


def test_one_class_is_counted_too() -> None:
    assert areas_of([0, 0, 0], [0, 255, 0], 1).flatten().tolist() == [2, 2, 2, 2]


def test_zero_means_unlabelled_when_asked() -> None:
    assert areas_of([0, 1, 1], [0, 1, 2], 2, reduce_zero_label=True).tolist() == [[0, 1], [1, 2], [0, 2], [1, 1]]


@pytest.mark.parametrize("ignore_index", [-100, 300])
def test_another_label_is_ignored_also_one_that_bytes_cannot_hold(ignore_index: int) -> None:
    assert areas_of([0, 1, 1], [0, 1, ignore_index], 2, ignore_index=ignore_index).tolist() == [[1, 1]] * 4
    label = torch.tensor([0, 255, ignore_index % 256], dtype=torch.uint8)
    areas = calculate_intersect_and_union(label.clone(), label, 256, ignore_index=ignore_index)
    assert areas.sum(dim=1).tolist() == [3] * 4


def test_shapes_must_match() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 3\] for labels of shape \[3, 2\]"):
        calculate_intersect_and_union(torch.zeros(2, 3), torch.zeros(3, 2), 2)


def test_large_datasets_keep_every_pixel() -> None:
    image = torch.full((4, 1), 250_001)
    image[0] -= 1
    metrics = calculate_segmentation_metrics([image] * 3000)
    assert metrics["mIoU"] == 250_000 / 250_001


def test_areas_are_summed_before_the_quotient() -> None:
    small, large = areas_of([0], [0], 1), areas_of([0] * 10, [0] * 5 + [3] * 5, 1)
    assert calculate_segmentation_metrics([small, large])["mIoU"] == 6 / 11


@pytest.mark.parametrize(
    ("groups", "keys"),
    [
        (["mIoU"], ["mIoU", "acc", "aAcc"]),
        (["dice"], ["acc", "aAcc", "dice"]),
        (["fscore"], ["aAcc", "fscore", "precision", "recall"]),
        (ALL, SEGMENTATION_METRICS),
    ],
)
def test_metrics_are_those_asked_for(groups: list[str], keys: list[str]) -> None:
    assert list(calculate_segmentation_metrics([areas_of([0, 1], [0, 0])], groups)) == keys


def test_another_metric_is_refused() -> None:
    with pytest.raises(KeyError, match="metric 'miou' .did you mean 'mIoU'"):
        calculate_segmentation_metrics([areas_of([0], [0])], ["miou"])


def test_what_drops_out_of_means() -> None:
    # Class 0 right once, 1 absent, 2 predicted only, 3 labelled only, 4 both but never at one pixel.
    areas = areas_of([0, 2, 4, 0], [0, 4, 3, 4], 5)
    by_class = total_area_to_metrics(*areas, metrics=ALL)
    nan = {
        name: [index for index, value in enumerate(v.tolist()) if math.isnan(value)]
        for name, v in by_class.items()
        if v.ndim
    }
    assert nan == {
        "mIoU": [1],
        "dice": [1],
        "acc": [1, 2],
        "recall": [1, 2],
        "precision": [1, 3],
        "fscore": [1, 2, 3, 4],
    }
    means = calculate_segmentation_metrics([areas], ALL)
    assert means["mIoU"] == pytest.approx((1 / 2) / 4) and means["acc"] == pytest.approx(1 / 3)
    assert means["aAcc"] == 1 / 4
    assert means["fscore"] == pytest.approx(2 / 3) and means["dice"] == pytest.approx((2 / 3) / 4)


def test_beta_weighs_recall() -> None:
    areas = areas_of([0, 0, 0, 1], [0, 1, 1, 1], 2)
    by_class = total_area_to_metrics(*areas, metrics=["fscore"], beta=2)
    precision, recall = 1 / 3, 1.0
    assert by_class["fscore"][0].item() == pytest.approx(5 * precision * recall / (4 * precision + recall))


def test_classes_are_logged_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dinov3"):
        calculate_segmentation_metrics([areas_of([0, 1], [0, 0], 2)], class_names=["wall", "a long name"])
    lines = caplog.messages[0].splitlines()
    assert lines[1].split() == ["class", "mIoU", "acc"]
    assert lines[2].split() == ["wall", "50.00", "50.00"] and lines[3].split() == ["a", "long", "name", "0.00", "nan"]
    with pytest.raises(ValueError, match="1 class names for areas of 2 classes"):
        calculate_segmentation_metrics([areas_of([0], [0], 2)], class_names=["wall"])


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        calculate_segmentation_metrics([])


def test_another_value_may_stand_for_unlabelled() -> None:
    label = torch.tensor([0, 1, 255, 300])
    assert preprocess_nonzero_labels(label, ignore_index=-1).tolist() == [-1, 0, 254, 299]
    with pytest.raises(ValueError, match=r"ignore_index=-1 does not fit labels of torch.uint8"):
        preprocess_nonzero_labels(label.to(torch.uint8), ignore_index=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_are_integers(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"got {dtype}"):
        preprocess_nonzero_labels(torch.ones(3, dtype=dtype))
