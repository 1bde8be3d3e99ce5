"""Golden cases of `classification`: k-NN."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from dinov3.eval import knn
from dinov3.eval.classification import data, knn_config
from dinov3.eval.classification.config import FewShotConfig
from dinov3.eval.classification.data import (
    create_train_dataset_dict,
)
from dinov3.eval.classification.knn_config import EvalConfig, KnnEvalConfig, TrainConfig
from dinov3.eval.classification.knn_module import KnnModule
from dinov3.eval.classification.metrics import (
    AveragingMethod,
    ClassificationMetricType,
    build_classification_metric,
)
from dinov3.eval.command import results
from dinov3.eval.command.config import args_dict_to_dataclass, cli_parser
from dinov3.eval.command.model import ModelConfig
from dinov3.eval.command.results import write_results
from dinov3.eval.features.extraction import extract_features, make_enumerated_loader
from tests.parity import deterministic, golden
from tests.parity.classification import Samples, assert_close, assert_tensor, by_id, case_of, expected, make_input


def as_plain(config: Any) -> Any:
    """A structured configuration as dictionaries, enumerations by name."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


@by_id("config.knn.defaults")
def test_defaults(case: dict[str, Any]) -> None:
    assert_close(case, as_plain(KnnEvalConfig), case["outputs"]["config"]["value"])
    assert case["outputs"]["results_filename"]["value"] == knn_config.RESULTS_FILENAME
    assert case["outputs"]["main_metrics"]["value"] == knn_config.MAIN_METRICS


@by_id("config.model.defaults")
def test_model_defaults(case: dict[str, Any]) -> None:
    assert_close(case, as_plain(ModelConfig), case["outputs"]["config"]["value"])


@by_id("config.enums")
def test_enumerations_are_members_of_the_published_ones(case: dict[str, Any]) -> None:
    stored = case["outputs"]["enums"]["value"]
    for enumeration in (ClassificationMetricType, AveragingMethod):
        ours = {name: member.value for name, member in enumeration.__members__.items()}
        assert ours.items() <= stored[enumeration.__name__].items()
    for member in (ClassificationMetricType.MEAN_ACCURACY, ClassificationMetricType.MEAN_PER_CLASS_ACCURACY):
        want = case["outputs"]["metric_properties"]["value"][member.name]
        assert (str(member), member.averaging_method.value) == (want["str"], want["averaging"])


@pytest.mark.parametrize("entry", case_of("config.cli")["outputs"]["cases"]["value"], ids=lambda e: e["argv"][0])
def test_command_lines(entry: dict[str, Any]) -> None:
    eval_args = cli_parser(entry["argv"])
    assert eval_args == entry["cli"]
    config, output_dir = args_dict_to_dataclass(eval_args, KnnEvalConfig, save_config=False)
    assert output_dir == entry["output_dir"]
    assert_close({"rtol": 1e-12, "atol": 0}, as_plain(config), entry["config"])


@pytest.mark.parametrize("entry", case_of("config.errors")["outputs"]["cases"]["value"], ids=lambda e: e["why"])
def test_wrong_command_lines_are_refused(entry: dict[str, Any]) -> None:
    key = "eval.test_dataset" if entry["why"].startswith("mandatory") else entry["argv"][-1].split("=")[0]
    with pytest.raises(ValueError, match=re.escape(key)):
        args_dict_to_dataclass(cli_parser(entry["argv"]), KnnEvalConfig, save_config=False)


def knn_module(case: dict[str, Any], **options: Any) -> KnnModule:
    inputs = case["inputs"]
    return KnnModule(
        train_features=make_input(inputs["X"]),
        train_labels=make_input(inputs["Y"]),
        device="cpu",
        ks=inputs["ks"],
        T=inputs["T"],
        num_classes=inputs["C"],
        skip_first_nn=inputs["skip_first_nn"],
        **options,
    )


CORE_CASES = [case for case in golden.cases("classification", "knn.") if not case["id"].startswith("knn.eval")]


@pytest.mark.parametrize("batch_size", [1, 10, 1000])
@pytest.mark.parametrize("case", CORE_CASES, ids=lambda case: case["id"])
def test_scores(case: dict[str, Any], batch_size: int) -> None:
    module = knn_module(case)
    parts = [module(batch) for batch in make_input(case["inputs"]["queries"]).split(batch_size)]
    for k in case["inputs"]["ks"]:
        scores = torch.cat([part[k] for part in parts])
        assert_tensor(case, scores, f"k{k}")
        best = scores.topk(min(2, scores.shape[1])).values
        clear = best[:, 0] - best[:, -1] >= 1e-5
        assert torch.equal(scores.argmax(dim=1)[clear], expected(case, f"k{k}_argmax")[clear])


@by_id("knn.eval")
def test_eval_knn(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    labels = make_input(inputs["Y"])
    labels[: inputs["C"]] = torch.arange(inputs["C"])
    dataset = Samples(make_input(inputs["X"]), labels)
    few_shot = inputs["tries"] > 0
    tries = create_train_dataset_dict(dataset, few_shot, inputs["k_or_percent"], max(1, inputs["tries"]))
    train = {
        name: dict(zip(("train_features", "train_labels"), extract_features(nn.Identity(), subset, 64, 0), strict=True))
        for name, subset in tries.items()
    }
    test_set = Samples(make_input(inputs["queries"]), make_input(inputs["Yq"]))
    per_k = knn.eval_knn(
        model=nn.Identity(),
        train_data_dict=train,
        test_data_loader=make_enumerated_loader(test_set, batch_size=32, num_workers=0),
        metric_collection=build_classification_metric(
            ClassificationMetricType[inputs["metric"]], num_classes=inputs["C"]
        ),
        knn_config=TrainConfig(dataset="", ks=inputs["ks"], temperature=inputs["T"]),
        num_classes=inputs["C"],
    )
    assert_close(case, per_k, case["outputs"]["per_k"]["value"])
    assert len(per_k) == len(case["outputs"]["per_k"]["value"])
    table = knn.make_columns(per_k, max(1, inputs["tries"]))
    assert_table(case, table, case["outputs"]["table"]["value"])


def assert_table(case: dict[str, Any], got: dict[str, float], want: dict[str, float]) -> None:
    """The published columns first; after them nothing but standard deviations."""
    assert list(got)[: len(want)] == list(want)
    assert all(name.endswith(" std") for name in list(got)[len(want) :])
    assert_close(case, got, want)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 8)

    def forward(self, samples: Tensor) -> Tensor:
        return self.fc(samples)


def toy_dataset(case: dict[str, Any], name: str) -> Samples:
    labels = make_input(case["inputs"]["data"][name]["labels"])
    labels[:6] = torch.arange(6)
    noise = deterministic.tensor(name, (len(labels), 12), 70)
    return Samples(deterministic.tensor("centers", (6, 12), 70)[labels] + 1.5 * noise, labels)


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+", text)]


@by_id("e2e.knn")
def test_whole_evaluation(case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case["inputs"]
    monkeypatch.setattr(data, "make_dataset", lambda *, dataset_str, **_: toy_dataset(case, dataset_str))
    config = KnnEvalConfig(
        model=ModelConfig(),
        train=TrainConfig(dataset="TOY_TRAIN", num_workers=0, ks=inputs["ks"], temperature=inputs["T"]),
        eval=EvalConfig(test_dataset="TOY_TEST", num_workers=0),
        few_shot=FewShotConfig(**(inputs["few_shot"] or {})),
        save_results=True,
        output_dir=str(tmp_path),
    )
    model = deterministic.fill_(Linear(), 70)
    table = knn.eval_knn_with_model(model=model, autocast_dtype=torch.float32, config=config)
    write_results(table, str(tmp_path), knn_config.RESULTS_FILENAME)

    outputs = {name: output["value"] for name, output in case["outputs"].items()}
    assert_table(case, table, outputs["results"])
    assert sorted(path.name for path in tmp_path.iterdir()) == outputs["files"]
    csv = results.load(tmp_path / knn_config.RESULTS_FILENAME)
    assert_table(case, {name: values[0] for name, values in csv.columns.items()}, outputs["results"])
    if not inputs["few_shot"]:
        assert numbers((tmp_path / knn_config.RESULTS_FILENAME).read_text()) == pytest.approx(
            numbers(outputs["csv"]), abs=1e-4
        )
    lines = (tmp_path / "results_eval_knn.json").read_text()
    assert re.sub(r"[\d.]+", "#", lines) == re.sub(r"[\d.]+", "#", outputs["json"])
    assert numbers(lines) == pytest.approx(numbers(outputs["json"]), abs=case["atol"])
    for name in outputs["files"]:
        if name.endswith(".npy"):
            rows = np.load(tmp_path / name)
            assert rows.shape == ((70, 6) if name.startswith("preds") else (70,))
