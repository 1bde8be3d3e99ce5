"""Golden cases of `classification`: logistic regression."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov3.eval import log_regression
from dinov3.eval.classification import data, log_regression_config
from dinov3.eval.classification.data import split_train_val_datasets
from dinov3.eval.classification.log_regression_config import EvalConfig, LogregEvalConfig, Solver, TrainConfig
from dinov3.eval.classification.log_regression_module import (
    C_VALUES,
    LogRegModule,
    get_best_logreg_with_features,
    train_for_C,
)
from dinov3.eval.classification.metrics import ClassificationMetricType, build_classification_metric
from dinov3.eval.command import results
from dinov3.eval.command.config import args_dict_to_dataclass, cli_parser
from dinov3.eval.command.model import ModelConfig
from dinov3.eval.command.results import write_results
from dinov3.eval.features.cache import FeaturesConfig
from tests.parity import deterministic
from tests.parity.classification import assert_close, assert_tensor, by_id, case_of, expected, make_input
from tests.parity.test_classification_knn import Linear, as_plain, numbers, toy_dataset

solvers = pytest.mark.parametrize("solver", [Solver.SKLEARN, Solver.TORCH], ids=lambda solver: solver.value)


@by_id("config.logreg.defaults")
def test_defaults(case: dict[str, Any]) -> None:
    assert_close(case, as_plain(LogregEvalConfig), case["outputs"]["config"]["value"])
    assert case["outputs"]["results_filename"]["value"] == log_regression_config.RESULTS_FILENAME
    assert case["outputs"]["main_metrics"]["value"] == log_regression_config.MAIN_METRICS


@pytest.mark.parametrize("entry", case_of("config.errors")["outputs"]["cases"]["value"], ids=lambda e: e["why"])
def test_wrong_command_lines_are_refused(entry: dict[str, Any]) -> None:
    key = "eval.test_dataset" if entry["why"].startswith("mandatory") else entry["argv"][-1].split("=")[0]
    with pytest.raises(ValueError, match=re.escape(key)):
        args_dict_to_dataclass(cli_parser(entry["argv"]), LogregEvalConfig, save_config=False)


@by_id("logreg.grid")
def test_grid(case: dict[str, Any]) -> None:
    assert_close(case, C_VALUES, case["outputs"]["C"]["value"])


class Plain:
    """Labels that are also the samples' numbers."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, int(self.labels[index])

    def get_targets(self) -> Any:
        return self.labels.numpy()


@by_id("subset.split")
def test_splits(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    dataset = Plain(make_input(inputs["labels"]))
    parts = split_train_val_datasets(dataset, inputs["split_percentage"], inputs["shuffle_train"])
    for name, part in zip(("train", "val"), parts, strict=True):
        assert [sample for sample, _ in part] == case["outputs"][name]["value"]


def fit(features: Tensor, labels: Tensor, C: float, solver: Solver) -> LogRegModule:
    return train_for_C(
        C=C, train_features=features, train_labels=labels, logreg_config=TrainConfig(dataset="", solver=solver)
    )


def multi_hot_labels(features: Tensor) -> Tensor:
    noise = deterministic.tensor("le", (120, 4), 42)
    return (features @ deterministic.tensor("lw", (6, 4), 42) + 1.5 * noise > 0.3).long()


@solvers
@by_id("logreg.multiclass", "logreg.binary", "logreg.multilabel")
def test_probabilities(case: dict[str, Any], solver: Solver) -> None:
    inputs = case["inputs"]
    features, queries = make_input(inputs["X"]), make_input(inputs["queries"])
    labels = multi_hot_labels(features) if inputs["Y"]["kind"] == "rule" else make_input(inputs["Y"])
    for C in inputs["C"]:
        module = fit(features, labels, C, solver)
        output = module(queries, "anything")
        assert output["target"] == "anything"
        assert_tensor(case, output["preds"], f"C{C:g}_preds")
        assert torch.equal(output["preds"].argmax(dim=1), expected(case, f"C{C:g}_argmax"))
        if f"C{C:g}_coef" in case["outputs"]:
            assert_tensor(case, module.weights, f"C{C:g}_coef")
            assert_tensor(case, module.intercept, f"C{C:g}_intercept")


@solvers
@by_id("logreg.classes")
def test_gaps_in_class_ids_stay_gaps(case: dict[str, Any], solver: Solver) -> None:
    inputs = case["inputs"]
    features, classes = make_input(inputs["X"]), case["outputs"]["classes"]["value"]
    preds = fit(features, make_input(inputs["Y"]), inputs["C"], solver)(features, None)["preds"]
    assert preds.shape == (16, 10)
    assert_tensor(case, preds[:, classes], "preds")
    assert not preds[:, [c for c in range(10) if c not in classes]].any()


@solvers
@by_id("logreg.sweep")
def test_sweeps(case: dict[str, Any], solver: Solver) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    labels = {name: make_input(inputs[name]) for name in ("Y", "val_Y", "test_Y")}
    num_classes = int(labels["Y"].max()) + 1
    make_metric = lambda: build_classification_metric(ClassificationMetricType.MEAN_ACCURACY, num_classes=num_classes)  # noqa: E731
    model = get_best_logreg_with_features(
        train_features=make_input(inputs["X"]),
        train_labels=labels["Y"],
        val_features=make_input(inputs["val_X"]),
        val_labels=labels["val_Y"],
        val_metric=make_metric(),
        concatenate_train_val=inputs["concatenate_train_val"],
        train_config=TrainConfig(dataset="", solver=solver),
    )
    assert model.sweep is not None
    found = [metrics["top-1"] for metrics in model.sweep.metrics]
    tolerance = 2.01 / len(labels["val_Y"])
    assert found == pytest.approx(outputs["val_top1"]["value"], abs=tolerance)
    assert model.sweep.best == outputs["best_index"]["value"]
    assert pytest.approx(outputs["best_C"]["value"], rel=1e-6) == model.C
    preds = model(make_input(inputs["test_X"]), None)["preds"]
    assert_tensor(case, preds, "test_preds")
    metric = make_metric()
    metric.update(preds, labels["test_Y"])
    assert float(metric.compute()["top-1"]) == pytest.approx(outputs["test_top1"]["value"])


@solvers
@by_id("e2e.logreg")
def test_whole_evaluation(
    case: dict[str, Any], solver: Solver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "make_dataset", lambda *, dataset_str, **_: toy_dataset(case, dataset_str))
    config = LogregEvalConfig(
        model=ModelConfig(),
        train=TrainConfig(dataset="TOY_TRAIN", val_dataset=case["inputs"]["val_dataset"], num_workers=0, solver=solver),
        eval=EvalConfig(test_dataset="TOY_TEST", num_workers=0),
        features=FeaturesConfig(cache=False),
        save_results=True,
        output_dir=str(tmp_path),
    )
    model = deterministic.fill_(Linear(), 70)
    table = log_regression.eval_log_regression_with_model(model=model, autocast_dtype=torch.float32, config=config)
    write_results(table, str(tmp_path), log_regression_config.RESULTS_FILENAME)

    outputs = case["outputs"]
    one_sample = {"rtol": 0, "atol": 100 / 70 + 1e-4}
    assert list(table) == list(outputs["results"]["value"])
    assert_close(one_sample, table, outputs["results"]["value"])
    assert sorted(path.name for path in tmp_path.iterdir()) == outputs["files"]["value"]
    text = (tmp_path / log_regression_config.RESULTS_FILENAME).read_text()
    assert text.splitlines()[0] == outputs["csv"]["value"].splitlines()[0]
    assert numbers(text)[2:] == pytest.approx(numbers(outputs["csv"]["value"])[2:], abs=one_sample["atol"])
    csv = results.load(tmp_path / log_regression_config.RESULTS_FILENAME)
    assert {name: values[0] for name, values in csv.columns.items()} == pytest.approx(table)
    assert_tensor(case, torch.from_numpy(np.load(tmp_path / "preds.npy")), "preds")
