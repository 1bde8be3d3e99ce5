"""Classes of pixels, object masks and panoptic maps of predictions that are written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov3.heads.mask2former.objects import flatten, instance, panoptic, semantic

NOTHING = 2  # of two classes


def logits_of(*queries: tuple[int, float]) -> Tensor:
    # The class of each query, and its probability; the rest is shared out among the others.
    probabilities = torch.stack([torch.full((3,), (1 - p) / 2).index_fill(0, torch.tensor([k]), p) for k, p in queries])
    return probabilities.log()


def masks_of(*rows: str) -> Tensor:
    # A character per pixel of a single row: # is inside.
    return torch.tensor([[[8.0 if pixel == "#" else -8.0 for pixel in row]] for row in rows])


def test_pixels_have_the_class_of_the_queries_that_cover_them() -> None:
    classes = semantic(logits_of((0, 0.9), (1, 0.9)), masks_of("##..", "..##"))
    assert classes.tolist() == [[0, 0, 1, 1]]
    assert semantic(logits_of((0, 0.9), (1, 0.9)), masks_of("##..", "..##"), (2, 8)).tolist() == [[0] * 4 + [1] * 4] * 2


def test_objects_of_one_class_stay_apart_and_the_best_comes_first() -> None:
    found = instance(logits_of((0, 0.8), (0, 0.9), (NOTHING, 0.98)), masks_of("#...", "..##", "####"), min_score=0.5)
    assert found.classes.tolist() == [0, 0]
    inside = torch.tensor(8.0).sigmoid()
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.8]) * inside)
    assert found.masks[:, 0].tolist() == [[False, False, True, True], [True, False, False, False]]


def test_stuff_has_no_objects_and_a_mask_without_a_pixel_is_none() -> None:
    found = instance(
        logits_of((0, 0.9), (1, 0.9), (1, 0.8)), masks_of("##..", "..##", "...."), stuff=[0], min_score=0.5
    )
    assert found.classes.tolist() == [1] and found.masks[:, 0].tolist() == [[False, False, True, True]]
    assert len(instance(logits_of((0, 0.9)), masks_of("#"), stuff=[0, 1]).scores) == 0


def test_no_more_objects_than_asked_for() -> None:
    assert len(instance(logits_of((0, 0.5), (1, 0.5)), masks_of("#", "#"), max_instances=3).scores) == 3


def test_segments_share_out_the_pixels() -> None:
    found = panoptic(logits_of((0, 0.95), (0, 0.9), (NOTHING, 0.98)), masks_of("###..", "...##", "#####"))
    assert found.ids.tolist() == [[1, 1, 1, 2, 2]] and found.classes.tolist() == [0, 0]
    assert found.scores.tolist() == pytest.approx([0.95, 0.9])


def test_masks_of_stuff_are_one_segment() -> None:
    found = panoptic(logits_of((0, 0.95), (1, 0.9), (0, 0.9)), masks_of("##...", "..#..", "...##"), stuff=[0])
    assert found.ids.tolist() == [[1, 1, 2, 1, 1]] and found.classes.tolist() == [0, 1]


def test_masks_that_others_hide_and_uncertain_ones_are_dropped() -> None:
    found = panoptic(logits_of((0, 0.95), (1, 0.9), (1, 0.7)), masks_of("####.", "..###", "....#"))
    assert found.ids.tolist() == [[1, 1, 1, 1, 0]] and found.classes.tolist() == [0]


def test_an_image_may_have_no_segments() -> None:
    found = panoptic(logits_of((NOTHING, 0.9)), masks_of("##"), (4, 4))
    assert len(found.classes) == 0 and not found.ids.any()


def test_the_best_object_is_on_top_of_those_that_it_overlaps() -> None:
    found = flatten(instance(logits_of((0, 0.8), (1, 0.9)), masks_of("###.", ".##."), min_score=0.5))
    assert found.ids.tolist() == [[2, 1, 1, 0]] and found.classes.tolist() == [1, 0]
