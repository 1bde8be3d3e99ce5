"""Golden cases of `classification`: linear probing."""

from __future__ import annotations

import csv
import io
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.data.samplers import InfiniteSampler
from dinov3.eval.classification import data
from dinov3.eval.classification.config import TransformConfig
from dinov3.eval.classification.linear_config import (
    MAIN_METRICS,
    RESULTS_FILENAME,
    LinearEvalConfig,
    LossType,
    OptimizerType,
    SchedulerType,
    TrainConfig,
)
from dinov3.eval.classification.linear_heads import (
    AllClassifiers,
    LinearClassifier,
    LinearPostprocessor,
    classifier_names,
    create_linear_input,
    scale_lr,
    setup_linear_classifiers,
)
from dinov3.eval.classification.linear_scoring import Evaluator
from dinov3.eval.classification.linear_training import train_step
from dinov3.eval.classification.metrics import ClassificationMetricType
from dinov3.eval.command.results import write_results
from tests.eval import linear_toy
from tests.parity import deterministic
from tests.parity.classification import assert_close, assert_tensor, by_id, case_of, make_input

Blocks = list[tuple[Tensor, Tensor]]


def blocks_of(case: dict[str, Any]) -> Blocks:
    return [(make_input(patches), make_input(cls)) for patches, cls in case["inputs"]["blocks"]]


@by_id("config.linear.defaults")
def test_defaults(case: dict[str, Any]) -> None:
    config = OmegaConf.to_container(OmegaConf.structured(LinearEvalConfig), enum_to_str=True)
    assert_close({"rtol": 1e-12, "atol": 0}, config, case["outputs"]["config"]["value"])
    assert case["outputs"]["results_filename"]["value"] == RESULTS_FILENAME
    assert case["outputs"]["main_metrics"]["value"] == MAIN_METRICS


@by_id("config.enums")
def test_enumerations(case: dict[str, Any]) -> None:
    stored = case["outputs"]["enums"]["value"]
    ours = (LossType, OptimizerType, SchedulerType, CheckpointRetentionPolicy)
    for enumeration in ours:
        assert {name: member.value for name, member in enumeration.__members__.items()} == stored[enumeration.__name__]


@pytest.mark.parametrize("name", [*case_of("linear.input")["outputs"]])
def test_input(name: str) -> None:
    case = case_of("linear.input")
    n, average = (int(number) for number in re.findall(r"\d+", name))
    assert_tensor(case, create_linear_input(blocks_of(case), n, bool(average)), name)


@by_id("linear.input.half")
def test_input_of_half_precision_tokens(case: dict[str, Any]) -> None:
    blocks = [(patches.half(), cls.half()) for patches, cls in blocks_of(case)]
    assert_tensor(case, create_linear_input(blocks, 2, True), "out")


def classifier() -> LinearClassifier:
    return deterministic.fill_(LinearClassifier(18, 2, True, num_classes=5), 31)  # type: ignore[return-value]


@by_id("linear.classifier")
def test_classifier(case: dict[str, Any]) -> None:
    assert_tensor(case, classifier()(blocks_of(case)), "logits")
    shapes = {name: list(t.shape) for name, t in classifier().state_dict().items()}
    assert shapes == case["outputs"]["state_dict"]["value"]


@by_id("linear.postprocess")
def test_class_mapping(case: dict[str, Any]) -> None:
    postprocessor = LinearPostprocessor(classifier(), make_input(case["inputs"]["class_mapping"]))
    got = postprocessor(blocks_of(case), make_input(case["inputs"]["targets"]))
    for name in ("preds", "target"):
        assert_tensor(case, got[name], name)


def grid(blocks: Blocks, rates: tuple[float, ...], seed: int) -> tuple[AllClassifiers, list[dict[str, Any]]]:
    classifiers, groups = setup_linear_classifiers(blocks, (1, 2), rates, batch_size=256, num_classes=5)
    return deterministic.fill_(classifiers, seed), groups  # type: ignore[return-value]


@by_id("linear.all")
def test_grid_of_classifiers(case: dict[str, Any]) -> None:
    blocks = blocks_of(case)
    classifiers, groups = grid(blocks, (0.05, 0.5), 32)
    logits = classifiers(blocks)
    fused = classifiers.fused.logits(create_linear_input(blocks, 2, True))
    outputs = case["outputs"]
    assert list(logits) == classifiers.fused.names == outputs["names"]["value"]
    for place, (name, values) in enumerate(logits.items()):
        assert_tensor(case, values, f"logits/{name}")
        assert_tensor(case, fused[:, place], f"logits/{name}")
    assert len(classifiers) == outputs["len"]["value"]
    shapes = {name: list(t.shape) for name, t in classifiers.state_dict().items()}
    assert list(shapes) == list(outputs["state_dict"]["value"])
    assert shapes == outputs["state_dict"]["value"]
    assert [group["lr"] for group in groups] == outputs["group_lrs"]["value"]


@pytest.mark.parametrize(
    "entry", case_of("linear.grid")["outputs"]["table"]["value"], ids=lambda e: f"{e['batch_size']}x{e['world_size']}"
)
def test_scaled_rates_and_names(entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov3.distributed.get_world_size", lambda: entry["world_size"])
    rates = TrainConfig(dataset="", val_dataset="").learning_rates
    scaled = [scale_lr(rate, entry["batch_size"]) for rate in rates]
    assert scaled == pytest.approx(entry["scaled_lrs"], rel=1e-12)
    names = classifier_names([(1, lr) for lr in scaled])
    assert len(set(names)) == len(rates)
    is_last = [
        entry["names"].index(name, place) == place and name not in entry["names"][place + 1 :]
        for place, name in enumerate(entry["names"])
    ]
    for name, want, last in zip(names, entry["names"], is_last, strict=True):
        assert name == want if last else name.startswith(f"{want}_")


@by_id("linear.schedule")
def test_schedules(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    scheduler_name, optimizer_name = case["id"].split(".")[2:]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in inputs["group_lrs"]]
    optimizer = OptimizerType(optimizer_name).get_optimizer(groups)
    scheduler_type = {"cosine": SchedulerType.COSINE_ANNEALING, "one_cycle": SchedulerType.ONE_CYCLE}
    n_steps = inputs["epochs"] * inputs["epoch_length"]
    lrs = [{"lr": lr} for lr in inputs["group_lrs"]]
    scheduler = scheduler_type[scheduler_name].get_scheduler(
        optimizer, lrs, inputs["epoch_length"], inputs["epochs"], n_steps
    )
    used: dict[str, list[list[float]]] = {"lr": [], "momentum": []}
    for _ in range(n_steps):
        groups_now = optimizer.param_groups
        used["lr"].append([group["lr"] for group in groups_now])
        used["momentum"].append([g["momentum"] if "momentum" in g else g["betas"][0] for g in groups_now])
        optimizer.step()
        scheduler.step()
    for name, values in used.items():
        assert_close(case, values, case["outputs"][name]["value"])


@pytest.mark.parametrize("case_id", ["linear.train.ce", "linear.train.bce"])
def test_training_steps(case_id: str) -> None:
    case = case_of(case_id)
    is_multi_hot = case_id.endswith("bce")
    seed, rates = (34, (0.01, 0.1)) if is_multi_hot else (33, (0.05, 0.5))

    def blocks_of_step(t: int) -> Blocks:
        shapes = (("patch", (8, 5, 6)), ("cls", (8, 6)))
        return [tuple(deterministic.tensor(f"s{t}.{k}{i}", s, seed) for k, s in shapes) for i in range(2)]  # type: ignore

    classifiers, groups = grid(blocks_of_step(0), rates, seed)
    loss_type = LossType.BINARY_CROSS_ENTROPY if is_multi_hot else LossType.CROSS_ENTROPY
    lrs = [{"lr": group["lr"]} for group in groups]
    optimizer_type = OptimizerType.ADAMW if is_multi_hot else OptimizerType.SGD
    scheduler_type = SchedulerType.ONE_CYCLE if is_multi_hot else SchedulerType.COSINE_ANNEALING
    optimizer = optimizer_type.get_optimizer(groups)
    scheduler = scheduler_type.get_scheduler(optimizer, lrs, 6, 2, 12)
    for t, want in enumerate(case["outputs"]["losses"]["value"]):
        if is_multi_hot:
            labels = (deterministic.uniform(f"s{t}.y", (8, 5), seed) > 0.6).long()
        else:
            labels = (deterministic.uniform(f"s{t}.y", (8,), seed) * 5).floor().long()
        inputs = create_linear_input(blocks_of_step(t), 2, True)
        losses = train_step(classifiers, inputs, labels, loss_type.get_criterion(), optimizer, scheduler)
        assert_close(case, losses.tolist(), want)
    for name, weight in classifiers.state_dict().items():
        assert_tensor(case, weight, f"final/{name}")


@pytest.mark.parametrize("number", range(3))
def test_choice_of_the_best_and_its_record(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = case_of("linear.select")["outputs"]["cases"]["value"][number]
    monkeypatch.setattr(data, "make_dataset", lambda **_: linear_toy.Images("val", 10))
    path = tmp_path / "results_eval_linear.json"
    evaluator = Evaluator(4, 0, TransformConfig(), "VALSET", ClassificationMetricType.MEAN_ACCURACY, path, 6, None)
    scores = {name: {"top-1": value} for name, value in entry["top1"]}
    monkeypatch.setattr(evaluator, "_score", lambda *_: (scores, {name: {} for name in scores}))
    model = torch.nn.Identity()
    assert evaluator.evaluate_and_maybe_save(model, model, 12, entry["best_on_val"]) == entry["result"]
    assert path.read_text() == entry["file_text"]


@by_id("linear.sampler")
def test_order_of_training_images(case: dict[str, Any]) -> None:
    for entry in case["outputs"]["orders"]["value"]:
        options = {name: entry[name] for name in ("start", "step", "advance")}
        sampler = InfiniteSampler(sample_count=case["inputs"]["sample_count"], shuffle=True, seed=0, **options)
        assert list(islice(sampler, 40)) == entry["first"]


def layout(text: str) -> str:
    return re.sub(r"[\d.]+", "#", re.sub(r"lr_\w+", "lr_#", text))


@by_id("e2e.linear.layout")
def test_files_of_a_whole_evaluation(case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear_toy.use_images(monkeypatch)
    outputs = {name: output["value"] for name, output in case["outputs"].items()}
    config = linear_toy.make_config(
        tmp_path,
        train__dataset="TOY_TRAIN",
        train__val_dataset="TOY_VAL",
        train__learning_rates=[0.01, 0.1, 1.0],
        train__batch_size=16,
        train__epochs=2,
        train__epoch_length=10,
        train__checkpoint_retention_policy=CheckpointRetentionPolicy.ALL,
        eval__test_datasets=["TOY_TEST"],
        save_results=True,
    )
    results = linear_toy.run(config)
    write_results(results, tmp_path, RESULTS_FILENAME)
    assert list(results) == outputs["result_keys"]
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert [name for name in files if not name.endswith(".jsonl")] == outputs["files"]
    assert layout((tmp_path / "results_eval_linear.json").read_text()) == layout(outputs["json"])
    header, row = csv.reader(io.StringIO((tmp_path / RESULTS_FILENAME).read_text()))
    want_header, want_row = csv.reader(io.StringIO(outputs["csv"]))
    assert header == want_header and len(row) == len(want_row)
    checkpoint = torch.load(tmp_path / "checkpoints" / "final" / "checkpoint.pth", weights_only=True)
    assert set(outputs["checkpoint_keys"]) <= set(checkpoint)
    assert checkpoint["iteration"] == outputs["iteration"]
    names = [name.removeprefix("module.") for name in outputs["weights"]]
    assert set(names) <= set(checkpoint["linear_classifiers"])
