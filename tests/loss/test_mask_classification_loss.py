"""The set loss of mask classification, against formulas that are written out."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.loss.mask_classification_loss import (
    MaskClassificationLoss,
    pairwise_costs,
    point_losses,
    values_at,
)
from tests.multiprocess import run_ranks

K, QUERIES, SIZE = 3, 4, 8


def predictions(n_images: int = 1, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pred_logits": torch.randn(n_images, QUERIES, K + 1, generator=generator, requires_grad=True),
        "pred_masks": torch.randn(n_images, QUERIES, SIZE, SIZE, generator=generator, requires_grad=True),
    }


def objects(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(K, (n,), generator=generator), torch.rand(n, SIZE, SIZE, generator=generator) < 0.4


def naive_pair(logits: Tensor, target: Tensor) -> tuple[float, float]:
    cross_entropies, intersection, area, true_area = [], 0.0, 0.0, 0.0
    for logit, t in zip(logits.tolist(), target.tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        cross_entropies.append(-math.log(p if t else 1 - p))
        intersection, area, true_area = intersection + p * t, area + p, true_area + t
    return sum(cross_entropies) / len(cross_entropies), 1 - (2 * intersection + 1) / (area + true_area + 1)


def test_losses_of_pairs_are_the_formulas() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 10, generator=generator)
    targets = (torch.rand(3, 10, generator=generator) < 0.5).float()
    want = torch.tensor([[naive_pair(x, t) for t in targets] for x in logits])  # [2, 3, 2]
    costs = torch.stack(pairwise_costs(logits, targets, torch.ones(10)), dim=-1)
    torch.testing.assert_close(costs, want)
    losses = torch.stack(point_losses(logits, targets[:2], torch.ones(1)), dim=-1)
    torch.testing.assert_close(losses, torch.stack([want[0, 0], want[1, 1]]))


def test_points_of_no_weight_do_not_count() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(2, 10, generator=generator), torch.ones(2, 10)
    weights = torch.tensor([1.0] * 6 + [0.0] * 4)
    for function in (pairwise_costs, point_losses):
        got, want = function(logits, targets, weights), function(logits[:, :6], targets[:, :6], torch.ones(6))
        torch.testing.assert_close(got, want)


def test_maps_are_read_between_the_centres_of_their_pixels() -> None:
    maps = torch.tensor([[[0.0, 4.0], [8.0, 12.0]]])
    points = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.5, 0.5], [0.0, 1.0]]])
    assert values_at(maps, points).tolist() == [[0, 4, 6, 8]]


def naive_loss(prediction: dict[str, Tensor], classes: Tensor, masks: Tensor, n_points: int) -> float:
    # Maps are constant, so that all points have the same values.
    probabilities = prediction["pred_logits"][0].detach().softmax(-1)
    logits = prediction["pred_masks"][0, :, 0, 0].detach()
    targets = masks[:, 0, 0].float()
    pairs = [
        [naive_pair(logits[q].expand(n_points), targets[g].expand(n_points)) for g in range(len(classes))]
        for q in range(QUERIES)
    ]

    def cost(q: int, g: int) -> float:
        return float(-2 * probabilities[q, classes[g]]) + 5 * pairs[q][g][0] + 5 * pairs[q][g][1]

    best = min(
        itertools.permutations(range(QUERIES), len(classes)),
        key=lambda chosen: sum(cost(q, g) for g, q in enumerate(chosen)),
    )
    labels, weights = [K] * QUERIES, [0.1] * QUERIES
    for g, q in enumerate(best):
        labels[q], weights[q] = int(classes[g]), 1.0
    cross_entropy = sum(
        w * -math.log(probabilities[q, k]) for q, (k, w) in enumerate(zip(labels, weights, strict=True))
    )
    mask_loss = sum(5 * pairs[q][g][0] + 5 * pairs[q][g][1] for g, q in enumerate(best)) / len(classes)
    return 2 * cross_entropy / sum(weights) + mask_loss


def test_the_loss_is_that_of_the_cheapest_assignment_summed_over_all_predictions() -> None:
    layers = []
    for seed in range(3):
        layer = predictions(seed=seed)
        layer["pred_masks"] = layer["pred_masks"][:, :, :1, :1].expand(1, QUERIES, SIZE, SIZE)
        layers.append(layer)
    classes = torch.tensor([2, 0])
    masks = torch.tensor([True, False])[:, None, None].expand(2, SIZE, SIZE)
    want = sum(naive_loss(layer, classes, masks, 40) for layer in layers)
    loss = MaskClassificationLoss(K, n_points=40)
    assert float(loss({**layers[0], "aux_outputs": layers[1:]}, [classes], [masks])) == pytest.approx(want, rel=1e-5)


def test_an_image_without_objects_teaches_only_the_classes() -> None:
    outputs = predictions()
    loss = MaskClassificationLoss(K, n_points=16)(outputs, [objects(0)[0]], [objects(0)[1]])
    log_probabilities = outputs["pred_logits"][0].log_softmax(-1)
    assert float(loss) == pytest.approx(-2 * float(log_probabilities[:, K].mean()))
    loss.backward()
    assert outputs["pred_logits"].grad is not None and float(outputs["pred_masks"].grad.abs().sum()) == 0


def test_more_objects_than_queries_are_matched_as_far_as_queries_go() -> None:
    classes, masks = objects(QUERIES + 3)
    assert MaskClassificationLoss(K, n_points=16)(predictions(), [classes], [masks]).isfinite()


def test_pixels_that_are_not_valid_do_not_count() -> None:
    valid = torch.ones(1, SIZE, SIZE, dtype=torch.bool)
    valid[:, :, SIZE // 2 :] = False
    classes, masks = objects(2)
    losses = []
    for inside in (True, False):
        changed = masks.clone()
        changed[:, :, SIZE // 2 + 1 :] = inside  # beyond the reach of bilinear interpolation
        generators = [torch.Generator().manual_seed(0)]
        loss = MaskClassificationLoss(K, n_points=64)
        losses.append(float(loss(predictions(), [classes], [changed], valid=valid, generators=generators)))
    assert losses[0] == losses[1]


def test_most_points_are_where_the_prediction_is_least_certain() -> None:
    ramp = torch.linspace(-4, 4, 64).expand(1, 64, 64)
    points = MaskClassificationLoss(K, n_points=400)._uncertain_points(ramp, torch.Generator().manual_seed(0))
    assert points.shape == (1, 400, 2)
    near = values_at(ramp, points).abs() < 1.2  # 30 % of the map; a quarter of the points has to be found in 75 %
    assert 0.75 <= float(near.float().mean()) < 0.95


def test_a_class_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objects of the classes \[7\]: expected classes from 0 to 2"):
        MaskClassificationLoss(K)(predictions(), [torch.tensor([7])], [objects(1)[1]])


def shared_loss(rank: int, world_size: int, directory: Path) -> None:
    outputs, targets = predictions(2), [objects(1), objects(3)]
    own = list(range(2)) if world_size == 1 else [rank]
    loss = MaskClassificationLoss(K, n_points=32)(
        {name: value[own] for name, value in outputs.items()},
        [targets[i][0] for i in own],
        [targets[i][1] for i in own],
        generators=[torch.Generator().manual_seed(i) for i in own],
    )
    torch.save(loss.detach(), directory / f"{world_size}_{rank}.pt")


@pytest.mark.distributed
def test_two_processes_have_the_mean_loss_of_one_on_the_whole_batch(tmp_path: Path) -> None:
    shared_loss(0, 1, tmp_path)
    run_ranks(shared_loss, 2, tmp_path)
    halves = [torch.load(tmp_path / f"2_{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(sum(halves) / 2, torch.load(tmp_path / "1_0.pt"))
