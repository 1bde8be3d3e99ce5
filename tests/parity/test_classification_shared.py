"""Golden cases of `classification`: what k-NN shares with other evaluations."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.eval.classification.data import (
    create_class_indices_mapping,
    create_train_dataset_dict,
    get_num_classes,
    pad_multilabel_and_collate,
)
from dinov3.eval.classification.metrics import (
    ClassificationMetricType,
    accuracy,
    build_classification_metric,
)
from dinov3.eval.classification.scoring import (
    ModelWithMultiScale,
    ModelWithNormalize,
    average_metrics,
    save_results,
    wrap_model,
)
from dinov3.eval.command import results
from dinov3.eval.features.extraction import ResultsAccumulator, extract_features
from tests.parity import deterministic
from tests.parity.classification import Samples, assert_close, assert_tensor, by_id, case_of, make_input


@by_id("subset.mapping", "subset.multilabel.mapping")
def test_class_indices(case: dict[str, Any]) -> None:
    mapping = create_class_indices_mapping(make_input(case["inputs"]["labels"]))
    assert {str(c): indices.tolist() for c, indices in mapping.items()} == case["outputs"]["mapping"]["value"]


@by_id(
    *(
        [
            "subset.k",
            "subset.percent",
            "subset.large_k",
            "subset.one",
            "subset.multilabel.k",
            "subset.multilabel.percent",
        ]
    )
)
def test_few_shot_subsets(case: dict[str, Any]) -> None:
    labels = make_input(case["inputs"]["labels"])
    dataset = Samples(torch.arange(len(labels)), labels)
    subsets = create_train_dataset_dict(dataset, True, case["inputs"]["k_or_percent"], case["inputs"]["n_tries"])
    indices = {str(name): [int(sample) for sample, _ in subset] for name, subset in subsets.items()}
    assert indices == case["outputs"]["indices"]["value"]


@by_id("subset.num_classes")
def test_number_of_classes(case: dict[str, Any]) -> None:
    for name, entry in case["inputs"].items():
        labels = make_input(entry)
        assert get_num_classes(Samples(labels, labels)) == case["outputs"][name]["value"]


@by_id("utils.average_metrics")
def test_average_over_tries(case: dict[str, Any]) -> None:
    averages = average_metrics(case["inputs"]["tries"], case["inputs"]["ignore_keys"])
    assert averages.keys() == case["outputs"]["out"]["value"].keys()
    assert_close(case, averages, case["outputs"]["out"]["value"])


@by_id("utils.collate")
def test_lists_of_classes_are_padded(case: dict[str, Any]) -> None:
    batch = [(torch.tensor(image), (index, target)) for image, index, target in case["inputs"]["batch"]]
    images, (index, targets) = pad_multilabel_and_collate(batch)
    for name, got in (("images", images), ("index", index), ("targets", targets)):
        assert_tensor(case, got, name)


@by_id("utils.accumulator")
def test_results_are_put_into_dataset_order(case: dict[str, Any]) -> None:
    preds, index = make_input(case["inputs"]["preds"]), make_input(case["inputs"]["index"])
    accumulator = ResultsAccumulator()
    for part in (slice(0, 2), slice(2, 5)):
        accumulator.update(preds[part], 10 * index[part], index[part])
    for name, got in accumulator.accumulate().items():
        assert_tensor(case, got, name)


class MeanOfConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).mean(dim=(2, 3))


@by_id("utils.wrap")
def test_wrapped_models(case: dict[str, Any]) -> None:
    images = make_input(case["inputs"]["images"])
    model = deterministic.fill_(MeanOfConvolution(), 61)
    with torch.no_grad():
        assert_tensor(case, ModelWithNormalize(model)(images), "normalize")
        assert_tensor(case, ModelWithMultiScale(model)(images), "multi_scale")
        assert_tensor(case, wrap_model(model, normalize=True, multi_scale=True)(images), "both")


@by_id("utils.extract_features")
def test_features_come_in_dataset_order(case: dict[str, Any]) -> None:
    dataset = Samples(make_input(case["inputs"]["samples"]), make_input(case["inputs"]["labels"]))
    model = ModelWithNormalize(nn.Identity())
    features, labels = extract_features(model, dataset, case["inputs"]["batch_size"], 0, gather_on_cpu=True)
    assert_tensor(case, features, "features")
    assert_tensor(case, labels, "labels")


@by_id("utils.save_results")
def test_names_of_saved_predictions(case: dict[str, Any], tmp_path: Path) -> None:
    for suffix, files in case["outputs"]["files"]["value"].items():
        directory = tmp_path / suffix
        save_results(torch.zeros(2), torch.zeros(2), directory, None if suffix == "None" else suffix)
        assert sorted(path.name for path in directory.iterdir()) == files


@by_id("metrics.multiclass")
def test_multiclass_metrics(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    scores, targets = make_input(inputs["logits"]), make_input(inputs["targets"])
    outputs = case["outputs"]
    if case["id"] == "metrics.multiclass.few":
        for ks, name in ((None, "default"), ((1, 2, 3), "ks_1_2_3")):
            metric = build_classification_metric(ClassificationMetricType.MEAN_ACCURACY, num_classes=inputs["C"], ks=ks)
            metric.update(scores, targets)
            assert_metric(case, metric.compute(), outputs[name]["value"])
        return
    scores[torch.arange(60), targets] += 1.0
    if case["id"] == "metrics.multiclass.absent":
        scores[:, 8] = -50
        targets[(targets == 3) | (targets == 8)] = 0
    for metric_type in (ClassificationMetricType[name] for name in ("MEAN_ACCURACY", "MEAN_PER_CLASS_ACCURACY")):
        metric = build_classification_metric(metric_type, num_classes=inputs["C"])
        metric.update(scores[:30], targets[:30])
        metric.update(scores[30:], targets[30:])
        assert_metric(case, metric.compute(), outputs[metric_type.name]["value"])


def assert_metric(case: dict[str, Any], got: dict[str, Tensor], want: dict[str, float]) -> None:
    assert got.keys() == want.keys()
    assert_close(case, got, want)


@by_id("metrics.accuracy")
def test_accuracy_function(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    values = accuracy(make_input(inputs["output"]), make_input(inputs["target"]), inputs["topk"])
    assert_close(case, values, case["outputs"]["values"]["value"])


@pytest.mark.parametrize(
    "entry", case_of("results.text")["outputs"]["cases"]["value"], ids=lambda e: ",".join(e["dict"])
)
def test_text_of_result_tables(entry: dict[str, Any], tmp_path: Path) -> None:
    table = results.make(entry["dict"])
    assert list(table.dtypes.values()) == entry["dtypes"]
    for file_format in (member for member in results.FileFormat if not member.is_binary):
        ending = file_format.value
        results.save_from_dict(entry["dict"], tmp_path / f"t{ending}")
        assert (tmp_path / f"t{ending}").read_text() == entry[ending[1:]]
        loaded = results.load(io.StringIO(entry[ending[1:]]), file_format)
        assert loaded.columns == {name: table.columns[name] for name in loaded.columns}
    assert list(results.load(tmp_path / "t.csv").dtypes.values()) == entry["loaded_dtypes"]
