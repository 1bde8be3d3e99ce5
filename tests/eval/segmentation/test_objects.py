"""Metrics of object masks and panoptic maps: those of the libraries on what is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.data.datasets.object_maps import IGNORED, NOTHING, STEP
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.objects import (
    average_precision,
    coco_content,
    coco_truth,
    evaluate_objects,
    stuff_indices,
)
from tests.multiprocess import run_ranks

pytest.importorskip("pycocotools")

H, W = 8, 12


def label_map() -> Tensor:
    """Two objects of class 0, class 1 as a whole, a part that does not count, and one without an object."""
    label = torch.full((H, W), NOTHING, dtype=torch.int32)
    label[:4, :3], label[:4, 4:7] = 0 + STEP, 0 + 2 * STEP
    label[4:, :6] = 1
    label[4:, 9:] = IGNORED
    return label


class Scenes:
    class_names = ("box", "floor")
    has_objects = True

    def __init__(self, labels: Sequence[Tensor]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return [torch.full((3, H, W), float(index))], self.labels[index][None]


class Model:
    """Predicts given masks and classes of each image, one query for each."""

    def __init__(self, objects: Sequence[tuple[Sequence[int], Tensor]]) -> None:
        self.objects = objects

    def eval(self) -> None: ...

    def predict(self, images: Tensor, rescale_to: Sequence[int]) -> dict[str, Tensor]:
        classes, masks = self.objects[int(images[0, 0, 0, 0])]
        logits = torch.nn.functional.one_hot(torch.tensor(classes), 3)[None] * 20.0
        return {"pred_logits": logits, "pred_masks": masks[None] * 40.0 - 20.0}


def masks_of(*values: int) -> Tensor:
    return torch.stack([label_map() == value for value in values]).float()


def measure(*objects: tuple[Sequence[int], Tensor], stuff: Sequence[str] = ()) -> dict[str, float]:
    config = SegmentationConfig(num_workers=0)
    config.decoder_head.num_classes = 2
    config.eval.tasks, config.eval.stuff = ["semantic", "instance", "panoptic"], list(stuff)
    dataset = Scenes([label_map()] * len(objects))
    return evaluate_objects(config, Model(objects), "cpu", dataset=dataset)


PERFECT = ([0, 0, 1], masks_of(STEP, 2 * STEP, 1))


def test_perfect_predictions_score_100() -> None:
    want = dict.fromkeys(["AP", "AP50", "PQ", "SQ", "RQ"], 100.0)
    assert measure(PERFECT) == pytest.approx(want)
    assert measure(PERFECT, PERFECT, stuff=["floor"]) == pytest.approx(want)


def test_an_object_that_is_missed_costs_recall() -> None:
    missed = measure(([0, 1], masks_of(STEP, 1)))
    # Of class 0 one of two objects: recognition 1 / (1 + 0.5); precision 1 up to a recall of 0.5, 51 of 101 points.
    assert missed["RQ"] == pytest.approx(100 * (2 / 3 + 1) / 2, abs=0.01) and missed["SQ"] == pytest.approx(100)
    assert missed["AP50"] == pytest.approx(100 * (51 / 101 + 1) / 2, abs=0.01)


def test_what_lies_where_pixels_do_not_count_is_not_wrong_elsewhere_it_is() -> None:
    ignored = measure(([0, 0, 1, 0], masks_of(STEP, 2 * STEP, 1, IGNORED)))
    assert ignored["PQ"] == pytest.approx(100) and ignored["AP"] == pytest.approx(100)
    false = measure(([0, 0, 1, 0], masks_of(STEP, 2 * STEP, 1, NOTHING)))
    assert false["RQ"] == pytest.approx(100 * (2 / 2.5 + 1) / 2, abs=0.01)


def measure_in_ranks(rank: int, world_size: int) -> dict[str, float]:
    return measure(PERFECT, ([0, 1], masks_of(STEP, 1)), PERFECT)


@pytest.mark.distributed
def test_two_processes_measure_what_one_does() -> None:
    one = measure_in_ranks(0, 1)
    assert 0 < one["PQ"] < 100 and 0 < one["AP"] < 100
    assert run_ranks(measure_in_ranks, 2) == [one, one]


def test_images_without_objects_and_without_predictions_are_measured() -> None:
    empty = measure(([2], torch.zeros(1, H, W)))
    assert empty == dict.fromkeys(["AP", "AP50", "PQ", "SQ", "RQ"], 0.0)


def test_stuff_has_no_precision_and_crowds_are_of_every_class() -> None:
    truth = coco_truth(label_map(), 0, 2, stuff={1})
    assert [(one["category_id"], one["iscrowd"], one["area"]) for one in truth] == [(1, 0, 12), (1, 0, 12), (1, 1, 12)]
    assert truth[1]["bbox"] == [4, 0, 3, 4]
    content = coco_content({0: (H, W)}, truth, ["box", "floor"], 2)
    assert average_precision(content, []) == {"AP": 0, "AP50": 0}


def test_stuff_is_named_or_numbered() -> None:
    config = SegmentationConfig()
    config.decoder_head.num_classes = 2
    config.eval.stuff = ["floor", "0"]
    assert stuff_indices(config, ["box", "floor"]) == {0, 1}
    config.eval.stuff = ["sky"]
    with pytest.raises(ValueError, match="eval.stuff: 'sky' is not a class; expected some of box, floor"):
        stuff_indices(config, ["box", "floor"])
