"""Top-k accuracies against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov3.eval.classification.metrics import ClassificationMetricType, accuracy, build_classification_metric

MEAN = ClassificationMetricType.MEAN_ACCURACY
PER_CLASS = ClassificationMetricType.MEAN_PER_CLASS_ACCURACY


def random_problem(seed: int) -> tuple[Tensor, Tensor]:
    """Scores with many ties, and targets that leave out two of seven classes."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (40, 7), generator=generator).float()
    return scores, torch.tensor([0, 1, 2, 4, 6])[torch.randint(5, (40,), generator=generator)]


def brute_force(scores: Tensor, targets: Tensor, k: int) -> tuple[float, float]:
    """Mean over samples, and mean over classes, by sorting; of equal scores the lower class comes first."""
    hits = []
    for row, target in zip(scores.tolist(), targets.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        hits.append((target, target in order[:k], order[0]))
    counted = {target for target, _, _ in hits} | ({predicted for _, _, predicted in hits} if k == 1 else set())
    shares = []
    for c in counted:
        own = [hit for target, hit, _ in hits if target == c]
        shares.append(sum(own) / len(own) if own else 0)
    return sum(hit for _, hit, _ in hits) / len(hits), sum(shares) / len(shares)


@pytest.mark.parametrize("seed", range(5))
def test_top_k_is_what_sorting_gives(seed: int) -> None:
    scores, targets = random_problem(seed)
    for metric_type, position in ((MEAN, 0), (PER_CLASS, 1)):
        metric = build_classification_metric(metric_type, num_classes=7, ks=(1, 3))
        for part in (slice(0, 11), slice(11, 11), slice(11, 40)):
            metric.update(scores[part], targets[part])
        for k in (1, 3):
            assert metric.compute()[f"top-{k}"].item() == pytest.approx(brute_force(scores, targets, k)[position])


def test_clone_and_reset_do_not_share_counts() -> None:
    metric = build_classification_metric(MEAN, num_classes=3)
    metric.update(torch.eye(3), torch.arange(3))
    copy = metric.clone()
    metric.reset()
    assert copy.compute()["top-1"] == 1 and metric.compute()["top-1"].isnan()


def test_inputs_are_left_alone() -> None:
    scores, targets = random_problem(0)
    before = scores.clone(), targets.clone()
    build_classification_metric(MEAN, num_classes=7).update(scores, targets)
    assert torch.equal(scores, before[0]) and torch.equal(targets, before[1])


def test_accuracy_is_in_percent() -> None:
    output = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert [value.item() for value in accuracy(output, torch.tensor([1, 0]), topk=(1, 2))] == [50, 100]


@pytest.mark.parametrize("name", ["MEAN_ACCURACY", "MEAN_PER_CLASS_ACCURACY", "MACRO_AVERAGED_MEAN_RECIPROCAL_RANK"])
def test_nan_scores_are_no_hits(name: str) -> None:
    metric = build_classification_metric(ClassificationMetricType[name], num_classes=3)
    metric.update(torch.full((6, 3), float("nan")), torch.arange(6) % 3)
    assert metric.compute()["top-1"] <= 1 / 3


def test_batch_whose_images_have_no_class_counts_nothing() -> None:
    metric = build_classification_metric(ClassificationMetricType.ANY_MATCH_ACCURACY, num_classes=3)
    metric.update(torch.eye(3), torch.empty(3, 0, dtype=torch.int64))
    metric.update(torch.eye(3), torch.tensor([[0], [2], [-1]]))
    assert metric.compute()["top-1"] == 0.5
