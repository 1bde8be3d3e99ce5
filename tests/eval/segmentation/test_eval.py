from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.eval.segmentation.eval import evaluate_segmentation_model
from dinov3.heads.segmentation import build_segmentation_decoder
from tests.parity.dense import tiny_vit
from tests.parity.toy_segmentor import ToySegmentor

K = 3


def evaluate(model: Any, *labels: Tensor, **options: Any) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    items = [
        ([torch.randn(1, 3, 32, 48, generator=generator)], (torch.tensor([index]), label))
        for index, label in enumerate(labels)
    ]
    return evaluate_segmentation_model(model, items, "cpu", 32, 32, "linear", K, torch.float32, **options)


def label_of(*ids: int) -> Tensor:
    """A label map [1, 1, 32, 48] with these classes."""
    return torch.tensor(ids, dtype=torch.uint8).repeat(1, 1, 32, 48 // len(ids))


@pytest.mark.parametrize(
    ("options", "ids", "allowed"),
    [({}, (0, 1, 7, 4), "1 to 3"), ({"reduce_zero_label": False}, (0, 3, 2, 255), "0 to 2")],
)
def test_labels_out_of_range_are_an_error_that_names_the_image(
    options: dict[str, Any], ids: tuple[int, ...], allowed: str
) -> None:
    good = label_of(1, 2, 255)
    unknown = "4, 7" if 7 in ids else "3"
    with pytest.raises(ValueError, match=f"image 1 .*labels {unknown}: for 3 classes expected {allowed}"):
        evaluate(ToySegmentor(K, seed=0), good, label_of(*ids), **options)


def test_labels_of_every_class_are_taken() -> None:
    assert evaluate(ToySegmentor(K, seed=0), label_of(0, 1, 3, 255))["aAcc"] >= 0
    assert evaluate(ToySegmentor(K, seed=0), label_of(0, 2, 255), reduce_zero_label=False)["aAcc"] >= 0


def test_a_model_in_training_mode_is_measured_in_evaluation_mode() -> None:
    model = build_segmentation_decoder(tiny_vit("segmentation"), "LAST", num_classes=K).train()
    before = model.segmentation_model[1].batchnorm_layer.running_mean.clone()
    evaluate(model, label_of(1, 2, 3))
    assert torch.equal(model.segmentation_model[1].batchnorm_layer.running_mean, before)
