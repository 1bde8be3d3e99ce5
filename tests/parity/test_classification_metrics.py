"""Golden cases of `classification`: metrics besides accuracy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.eval.classification.metrics import AveragingMethod, ClassificationMetricType, build_classification_metric
from dinov3.eval.classification.metrics import imagenet_c as ic
from tests.parity.classification import assert_close, assert_tensor, by_id, case_of, make_input


def computed(metric: Any, scores: Tensor, targets: Tensor, n_first: int) -> dict[str, Tensor]:
    """The value after two updates, which leave their arguments as they are."""
    before = scores.clone(), targets.clone()
    metric.update(scores[:n_first], targets[:n_first])
    metric.update(scores[n_first:], targets[n_first:])
    assert torch.equal(scores, before[0]) and torch.equal(targets, before[1])
    return metric.compute()


def assert_values(case: dict[str, Any], got: dict[str, Tensor], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    assert_close(case, {name: value.tolist() for name, value in got.items()}, want)


@by_id("config.enums")
def test_all_published_metrics_are_there(case: dict[str, Any]) -> None:
    stored = case["outputs"]["enums"]["value"]
    for enumeration in (ClassificationMetricType, AveragingMethod):
        ours = {name: member.value for name, member in enumeration.__members__.items()}
        assert ours == stored[enumeration.__name__]
    for name, want in case["outputs"]["metric_properties"]["value"].items():
        member = ClassificationMetricType[name]
        averaging = member.averaging_method.value if member.averaging_method else None
        assert (str(member), averaging) == (want["str"], want["averaging"])
        assert member.is_topk_accuracy == want["topk_accuracy"]
        assert member.is_topk_recall == want["topk_recall"]
        assert member.is_multilabel == want["multilabel"]


@pytest.mark.parametrize("name", case_of("metrics.multiclass")["outputs"])
@pytest.mark.parametrize("case_id", ["metrics.multiclass", "metrics.multiclass.absent"])
def test_metrics_of_one_class_per_sample(case_id: str, name: str) -> None:
    case = case_of(case_id)
    scores, targets = make_input(case["inputs"]["logits"]), make_input(case["inputs"]["targets"])
    scores[torch.arange(60), targets] += 1.0
    if case_id.endswith("absent"):
        scores[:, 8] = -50
        targets[(targets == 3) | (targets == 8)] = 0
    metric = build_classification_metric(ClassificationMetricType[name], num_classes=case["inputs"]["C"])
    assert_values(case, computed(metric, scores, targets, 30), case["outputs"][name]["value"])


@pytest.mark.parametrize("entry", [*case_of("metrics.multilabel")["outputs"]])
def test_multilabel_metrics(entry: str) -> None:
    case = case_of("metrics.multilabel")
    targets = make_input(case["inputs"]["targets"])
    scores = make_input(case["inputs"]["logits"]) + 1.2 * targets
    name, form = entry.split("/")
    metric = build_classification_metric(ClassificationMetricType[name], num_classes=6)
    got = computed(metric, scores.sigmoid() if form == "probabilities" else scores, targets, 20)
    assert_values(case, got, case["outputs"][entry]["value"])


@pytest.mark.parametrize("name", [*case_of("metrics.multilabel.absent")["outputs"]])
def test_multilabel_metrics_without_positives_in_a_class(name: str) -> None:
    case = case_of("metrics.multilabel.absent")
    targets = make_input(case["inputs"]["targets"])
    scores = make_input(case["inputs"]["logits"]) + 1.2 * targets
    targets[:, 1] = 0
    metric = build_classification_metric(ClassificationMetricType[name], num_classes=6)
    assert_values(case, computed(metric, scores, targets, 20), case["outputs"][name]["value"])


@by_id("metrics.voc2007.endpoint")
def test_point_at_recall_zero(case: dict[str, Any]) -> None:
    scores = torch.linspace(0.9, 0.1, 10)[:, None].repeat(1, 2)
    targets = torch.zeros(10, 2, dtype=torch.int64)
    targets[9] = 1
    metric = build_classification_metric(ClassificationMetricType.MEAN_AVERAGE_PRECISION_VOC_2007, num_classes=2)
    assert_values(case, computed(metric, scores, targets, 5), case["outputs"]["map"]["value"])


@by_id("metrics.any_match")
def test_any_match(case: dict[str, Any]) -> None:
    scores, targets = make_input(case["inputs"]["scores"]), make_input(case["inputs"]["targets"])
    for ks, name in ((None, "default"), ((1, 2, 3), "ks")):
        metric = build_classification_metric(ClassificationMetricType.ANY_MATCH_ACCURACY, num_classes=8, ks=ks)
        assert_values(case, computed(metric, scores, targets, 13), case["outputs"][name]["value"])


class Grouped:
    def __init__(self, groups: Any, targets: Any) -> None:
        self.get_groupby_labels = lambda: groups
        self.get_mapped_targets = lambda: targets


@pytest.mark.parametrize("name", [*case_of("metrics.groupby")["outputs"]])
def test_any_match_by_group(name: str) -> None:
    case = case_of("metrics.groupby")
    scores = make_input(case["inputs"]["scores"])
    dataset = Grouped(case["inputs"]["groups"], make_input(case["inputs"]["mapped_targets"]))
    metric = build_classification_metric(ClassificationMetricType[name], num_classes=8, dataset=dataset)
    index = torch.arange(len(scores)).flip(0)
    assert_values(case, computed(metric, scores[index], index, 13), case["outputs"][name]["value"])


@by_id("metrics.mrr")
def test_reciprocal_rank_with_ties(case: dict[str, Any]) -> None:
    scores = torch.nn.functional.pad(make_input(case["inputs"]["scores"]), (0, 1))
    metric = build_classification_metric(ClassificationMetricType.MACRO_AVERAGED_MEAN_RECIPROCAL_RANK, num_classes=5)
    got = computed(metric, scores, make_input(case["inputs"]["targets"]), 2)
    assert_values(case, got, case["outputs"]["value"]["value"])


@by_id("metrics.imagenet_c.constants")
def test_reference_errors(case: dict[str, Any]) -> None:
    ours = {name: {str(k): v for k, v in levels.items()} for name, levels in ic.ALEXNET_INVERSE_SCORES.items()}
    assert_close(case, ours, case["outputs"]["reference_errors"]["value"])
    ids = {f"{name}:{level}": number for (name, level), number in ic.CORRUPTION_LEVEL_TO_ID.items()}
    assert ids == case["outputs"]["identifier"]["value"]


def test_mean_corruption_error() -> None:
    case = case_of("metrics.imagenet_c")
    scores, labels = make_input(case["inputs"]["scores"]), make_input(case["inputs"]["labels"])
    rows = torch.arange(400)
    corruption, level = rows % 19, rows // 19 % 5 + 1
    scores[rows, labels] += 1.5 - 0.3 * level
    assert tuple(case["inputs"]["corruption_names"]) == ic.CORRUPTION_TYPES
    metric = build_classification_metric(ClassificationMetricType.IMAGENET_C_METRIC, num_classes=5)
    got = computed(metric, scores, torch.stack([labels, corruption, level], dim=1), 170)
    assert_close(case, float(got["top-1"]), case["outputs"]["mce"]["value"])
    assert_tensor(case, metric.tp.float(), "tp")
    assert_tensor(case, metric.total.float(), "total")


@by_id("metrics.imagenet_c.average")
def test_relative_average_over_what_is_covered(case: dict[str, Any]) -> None:
    accuracy = {
        name: {int(level): value for level, value in levels.items()}
        for name, levels in case["inputs"]["accuracy"].items()
    }
    got = ic.compute_relative_average_scores(accuracy, ic.ALEXNET_INVERSE_SCORES)
    assert_close(case, got, case["outputs"]["mce"]["value"])
