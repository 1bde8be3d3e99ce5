"""Object maps: classes and objects in one integer per pixel."""

from __future__ import annotations

import torch

from dinov3.data.datasets.object_maps import IGNORED, NOTHING, STEP, classes_of, objects_of, valid_pixels

LABEL = torch.tensor([[0, 2, IGNORED], [2 + STEP, 2 + 300 * STEP, NOTHING]], dtype=torch.int32)


def test_objects_of_one_class_are_told_apart() -> None:
    classes, masks = objects_of(LABEL)
    assert classes.tolist() == [0, 2, 2, 2]
    positions = [mask.nonzero().tolist() for mask in masks]
    assert positions == [[[0, 0]], [[0, 1]], [[1, 0]], [[1, 1]]]


def test_ignored_pixels_do_not_count_and_others_may_be_in_no_object() -> None:
    assert valid_pixels(LABEL).tolist() == [[True, True, False], [True, True, True]]
    assert classes_of(LABEL).tolist() == [[0, 2, 255], [2, 2, 255]]


def test_a_map_of_classes_has_an_object_per_class() -> None:
    classes, masks = objects_of(torch.tensor([[3, 3], [1, 255]], dtype=torch.uint8))
    assert classes.tolist() == [1, 3] and masks.sum(dim=(1, 2)).tolist() == [1, 2]


def test_an_image_may_have_no_objects() -> None:
    classes, masks = objects_of(torch.full((2, 3), IGNORED, dtype=torch.uint8))
    assert classes.shape == (0,) and masks.shape == (0, 2, 3)
