"""Linear probing: training, resuming, choosing, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.eval import linear
from dinov3.eval.classification import data, linear_training
from dinov3.eval.classification.linear_config import (
    LinearEvalConfig,
    LossType,
    OptimizerType,
    SchedulerType,
    TrainConfig,
)
from dinov3.eval.classification.linear_heads import (
    LinearInputs,
    classifier_names,
    create_linear_input,
    setup_linear_classifiers,
)
from dinov3.eval.classification.linear_scoring import Evaluator, format_grid, select_best, warn_if_at_end
from dinov3.eval.classification.linear_training import find_checkpoint, make_batches, read_checkpoint, write_checkpoint
from dinov3.eval.classification.metrics import ClassificationMetricType
from dinov3.eval.command.results import as_file_name
from dinov3.models.intermediate_layers import ModelWithIntermediateLayers

from . import linear_toy as toy

KEEP = CheckpointRetentionPolicy.ALL


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> None:
    toy.use_images(monkeypatch)


def final_weights(directory: Path) -> dict[str, Tensor]:
    return read_checkpoint(directory / "checkpoints" / "final" / "checkpoint.pth")["linear_classifiers"]


class KilledError(Exception):
    pass


def kill_after(monkeypatch: pytest.MonkeyPatch, n_steps: int) -> None:
    """Let the step with this number fail, as if the process ended there."""
    step, n_done = linear_training.train_step, 0

    def counted(*args: Any) -> Tensor:
        nonlocal n_done
        n_done += 1
        if n_done > n_steps:
            raise KilledError
        return step(*args)

    monkeypatch.setattr(linear_training, "train_step", counted)


def kill_in_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end after a checkpoint was written, but before it has its name."""

    def publish(*_: Any) -> None:
        raise KilledError

    monkeypatch.setattr(linear_training, "publish_directory", publish)


@pytest.mark.parametrize(
    "optimizer, scheduler, augment",
    [
        (OptimizerType.SGD, SchedulerType.COSINE_ANNEALING, True),
        (OptimizerType.ADAMW, SchedulerType.ONE_CYCLE, False),
    ],
)
def test_killed_run_ends_with_the_files_of_an_undisturbed_one(
    optimizer: Any, scheduler: Any, augment: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str) -> LinearEvalConfig:
        return toy.make_config(
            tmp_path / name,
            train__dataset="jitter:90" if augment else "train:90",
            train__augment=augment,
            train__optimizer_type=optimizer,
            train__scheduler_type=scheduler,
            train__save_checkpoint_iterations=2,
            train__eval_period_iterations=3,
            train__checkpoint_retention_policy=KEEP,
            eval__test_datasets=["TOY_TEST"],
            save_results=True,
        )

    want = toy.run(config("whole"))
    # Four lives: before the first checkpoint, then after 3 and 9 steps, with validations that no checkpoint has seen,
    # and in a save.
    for kill in (
        lambda patch: kill_after(patch, 1),
        lambda patch: kill_after(patch, 3),
        lambda patch: kill_after(patch, 7),
        kill_in_save,
    ):
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            kill(patch)
            toy.run(config("killed"))
    assert toy.run(config("killed")) == want

    whole, killed = (
        {str(p.relative_to(tmp_path / name)): p for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    assert {"checkpoints/best/checkpoint.pth", "results_eval_linear.jsonl", "preds_TOY_TEST.npy"} < whole.keys()
    for name, path in whole.items():
        if path.suffix == ".pth":
            one, other = (read_checkpoint(file) for file in (path, killed[name]))
            assert one["best_accuracy"] == other["best_accuracy"] and one["scheduler"] == other["scheduler"]
            for entry, tensor in one["linear_classifiers"].items():
                assert torch.equal(other["linear_classifiers"][entry], tensor)
        else:
            assert path.read_bytes() == killed[name].read_bytes()


def test_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy.make_config(tmp_path, train__checkpoint_retention_policy=KEEP)
    want = toy.run(config)
    kill_after(monkeypatch, 0)
    assert toy.run(config) == want


@pytest.mark.parametrize("policy, left", [("ALL", ["7", "best", "final"]), ("LAST", ["final"]), ("NONE", [])])
def test_checkpoints_that_stay(policy: str, left: list[str], tmp_path: Path) -> None:
    toy.run(
        toy.make_config(
            tmp_path,
            train__save_checkpoint_iterations=8,
            train__checkpoint_retention_policy=CheckpointRetentionPolicy[policy],
        )
    )
    directory = tmp_path / "checkpoints"
    assert sorted(p.name for p in directory.iterdir()) == left if left else not directory.exists()


def test_weights_of_the_last_step_may_be_the_best(tmp_path: Path) -> None:
    results = toy.run(
        toy.make_config(
            tmp_path, train__eval_period_iterations=0, train__checkpoint_retention_policy=CheckpointRetentionPolicy.BEST
        )
    )
    best = read_checkpoint(tmp_path / "checkpoints" / "best" / "checkpoint.pth")
    assert (best["iteration"], best["best_accuracy"]) == (11, results["TOY_VAL_accuracy"])


def test_best_of_the_earlier_life_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy.make_config(tmp_path, train__eval_period_iterations=2, train__save_checkpoint_iterations=3)
    config.train.checkpoint_retention_policy = KEEP

    def falling(evaluator: Evaluator, *_: Any, **__: Any) -> dict[str, Any]:
        return {evaluator.main_metric_name: next(scores)}

    scores = iter([90.0, 80.0, 80.0, 70.0])
    monkeypatch.setattr(Evaluator, "evaluate_and_maybe_save", falling)
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        kill_after(patch, 5)
        toy.run(config)
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        kill_after(patch, 4)  # resumed after 3 steps, validated after 4 and 6
        toy.run(config)
    best = read_checkpoint(tmp_path / "checkpoints" / "best" / "checkpoint.pth")
    assert (best["iteration"], best["best_accuracy"]) == (1, 90.0)


def published_checkpoint(path: Path, iteration: int, source: Path) -> None:
    """As the official release writes it: wrapped names, no schedule."""
    content = read_checkpoint(source)
    state = {f"module.{name}": tensor for name, tensor in content["linear_classifiers"].items()}
    path.mkdir(parents=True)
    kept = {name: content[name] for name in ("optimizer", "best_accuracy")}
    torch.save(kept | {"iteration": iteration, "linear_classifiers": state}, path / "checkpoint.pth")


def test_published_checkpoint_is_continued_at_its_place_in_the_schedule(tmp_path: Path) -> None:
    options: dict[str, Any] = {"train__checkpoint_retention_policy": KEEP, "train__save_checkpoint_iterations": 6}
    toy.run(toy.make_config(tmp_path / "whole", **options))
    published_checkpoint(tmp_path / "given" / "5", 5, tmp_path / "whole" / "checkpoints" / "5" / "checkpoint.pth")
    toy.run(toy.make_config(tmp_path / "again", train__classifier_fpath=str(tmp_path / "given"), **options))
    for name, tensor in final_weights(tmp_path / "whole").items():
        assert torch.equal(final_weights(tmp_path / "again")[name], tensor)


def test_checkpoint_may_be_given_as_file_or_directory_but_that_of_the_run_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "given" / "5" / "checkpoint.pth"
    write_checkpoint(file.parent, {})
    for given in (file, file.parent, tmp_path / "given"):
        config = toy.make_config("", train__classifier_fpath=str(given)).train
        assert find_checkpoint(config, tmp_path / "own") == file
    write_checkpoint(tmp_path / "own" / "3", {})
    assert find_checkpoint(config, tmp_path / "own") == tmp_path / "own" / "3" / "checkpoint.pth"
    write_checkpoint(tmp_path / "own" / "final", {})
    assert find_checkpoint(config, tmp_path / "own") == tmp_path / "own" / "final" / "checkpoint.pth"
    assert find_checkpoint(toy.make_config("", train__resume=False).train, tmp_path / "own") is None


def test_checkpoint_path_without_checkpoint_is_refused(tmp_path: Path) -> None:
    config = toy.make_config(tmp_path / "out", train__classifier_fpath=str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"classifier_fpath.*expected"):
        toy.run(config)


def test_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    toy.run(toy.make_config(tmp_path, train__checkpoint_retention_policy=KEEP))
    changes: list[tuple[str, dict[str, Any]]] = [
        ("another grid", {"train__learning_rates": [0.2, 1.0]}),
        ("train.epochs: 3, now 5", {"train__epochs": 5}),
        ("images per step: 16, now 8", {"train__batch_size": 8, "train__learning_rates": [0.2, 2.0]}),
        ("training images: 90, now 91", {"train__dataset": "other:91"}),
    ]
    for message, change in changes:
        with pytest.raises(ValueError, match=f"{message}.*train.resume=false"):
            toy.run(toy.make_config(tmp_path, **change))


def test_checkpoint_of_another_backbone_is_refused(tmp_path: Path) -> None:
    config = toy.make_config(tmp_path, train__checkpoint_retention_policy=KEEP)
    toy.run(config)
    other = toy.Backbone()
    other.layers[0].bias.data += 1  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match="other settings .model: "):
        toy.run(config, other)


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints" / "final"
    directory.mkdir(parents=True)
    (directory / "checkpoint.pth").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"final/checkpoint\.pth is not a checkpoint"):
        toy.run(toy.make_config(tmp_path))


def test_fused_classifiers_train_as_separate_ones() -> None:
    torch.manual_seed(0)
    blocks = [(torch.randn(9, 4, 8), torch.randn(9, 8)) for _ in range(2)]
    labels = torch.arange(9) % 6
    criterion = LossType.CROSS_ENTROPY.get_criterion()

    def trained(fused: bool) -> dict[str, Tensor]:
        classifiers, groups = setup_linear_classifiers(blocks, [2, 1], [0.5, 5.0], 128, 6)
        optimizer = OptimizerType.SGD.get_optimizer(groups)
        for _ in range(5):
            if fused:
                classifiers.fused.backward(create_linear_input(blocks, 2, True), labels, criterion)
            else:
                optimizer.zero_grad()
                sum(criterion(logits, labels).mean() for logits in classifiers(blocks).values()).backward()  # type: ignore
            optimizer.step()
        return classifiers.state_dict()

    separate = trained(fused=False)
    for name, tensor in trained(fused=True).items():
        torch.testing.assert_close(tensor, separate[name], rtol=0, atol=1e-6)


def test_classifiers_that_were_moved_are_fused_again() -> None:
    blocks = [(torch.randn(3, 4, 8), torch.randn(3, 8))]
    classifiers, _ = setup_linear_classifiers(blocks, [1], [0.5, 5.0], 128, 6)
    before = classifiers.fused
    assert classifiers.fused is before
    classifiers.double().float()
    assert classifiers.fused is not before
    first = classifiers.classifiers_dict[classifiers.fused.names[0]]
    first.linear.bias.data += 1
    logits = classifiers.fused.logits(create_linear_input(blocks, 1, True))
    torch.testing.assert_close(logits[:, 0], first(blocks))


def test_initial_weights_do_not_depend_on_what_was_drawn_before() -> None:
    blocks = [(torch.randn(3, 4, 8), torch.randn(3, 8))]
    one, other = (setup_linear_classifiers(blocks, [1], [0.5, 5.0], 128, 6)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    weights = [tensor for name, tensor in one.items() if name.endswith("weight")]
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("batch_size", [1, 3, 64, 128, 1000, 4096])
@pytest.mark.parametrize("world_size", [1, 2, 64])
def test_classifiers_have_different_names(batch_size: int, world_size: int) -> None:
    rates = TrainConfig(dataset="", val_dataset="").learning_rates
    grid = [(n, rate * batch_size * world_size / 256) for n in (1, 4) for rate in rates]
    assert len(set(classifier_names(grid))) == len(grid)


def test_features_are_computed_once_without_augmentation(tmp_path: Path) -> None:
    model = toy.Backbone()
    results = toy.run(toy.make_config(tmp_path, train__augment=False), model)
    n_probed = 20  # single images, for the width of features
    assert model.n_seen <= 90 + 50 + n_probed
    assert results == toy.run(toy.make_config(tmp_path / "again"))


def test_features_beyond_the_budget_are_streamed_to_the_same_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    want = toy.run(toy.make_config(tmp_path / "a", train__augment=False))
    with caplog.at_level("WARNING", logger="dinov3"):
        got = toy.run(toy.make_config(tmp_path / "b", train__augment=False, train__memory_budget_mb=0.001))
    assert got == want
    assert any("go through the model in every pass" in record.getMessage() for record in caplog.records)


def test_augmented_batches_do_not_depend_on_workers_or_on_where_they_start() -> None:
    model = ModelWithIntermediateLayers(toy.Backbone(), 2, torch.no_grad)

    def batches(workers: int, first: int, count: int) -> list[Tensor]:
        config = toy.make_config("", train__num_workers=workers).train
        stream = make_batches(model, toy.Images("jitter", 37, jitter=True), config, first, None)
        return [next(stream)[0] for _ in range(count)]

    want = batches(0, 0, 6)
    assert not torch.equal(want[0], want[1])
    for got in (batches(2, 0, 6)[4:], batches(0, 4, 2)):
        for one, other in zip(got, want[4:], strict=True):
            assert torch.equal(one, other)


def test_diverged_classifier_is_never_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = toy.make_config(tmp_path, train__learning_rates=[1.0, 5e39], train__n_last_blocks_list=[1])
    with caplog.at_level("WARNING", logger="dinov3"):
        results = toy.run(config)
    assert results["best_classifier"] == "classifier_1_blocks_avgpool_True_lr_0_06250"
    assert any("diverged" in record.getMessage() for record in caplog.records)


def test_all_classifiers_diverged(tmp_path: Path) -> None:
    config = toy.make_config(tmp_path, train__learning_rates=[5e39], train__n_last_blocks_list=[1])
    with pytest.raises(ValueError, match=r"all classifiers diverged.*classifier_1_blocks.*learning_rates"):
        toy.run(config)


def test_equal_scores_and_all_scores_after_nan_are_improvements() -> None:
    metrics = ClassificationMetricType.MEAN_ACCURACY, ClassificationMetricType.IMAGENET_C_METRIC
    higher, lower = (SimpleNamespace(metric_type=metric) for metric in metrics)

    def is_improvement(evaluator: Any, accuracy: float, best: float) -> bool:
        return Evaluator.is_improvement(evaluator, accuracy, best)

    assert is_improvement(higher, 2.0, 1.0) and is_improvement(lower, 1.0, 2.0) and is_improvement(higher, 1.0, 1.0)
    assert not is_improvement(higher, 1.0, 2.0) and not is_improvement(lower, 2.0, 1.0)
    assert is_improvement(higher, 1.0, -1.0) and is_improvement(higher, 1.0, float("nan"))
    assert not is_improvement(higher, float("nan"), 1.0)


def test_best_of_scores() -> None:
    scores = {"a": float("nan"), "b": 0.5, "c": 0.75, "d": 0.75}
    assert select_best(scores) == "c"
    assert select_best(scores, lower_is_better=True) == "b"


def test_tests_use_the_classifier_chosen_on_validation_and_predictions_are_saved(tmp_path: Path) -> None:
    dataset = "test_with:60"
    results = toy.run(toy.make_config(tmp_path, eval__test_datasets=[dataset, "TOY_TEST"], save_results=True))
    assert list(results) == ["TOY_TEST_accuracy", "best_classifier", f"{dataset}_accuracy", "TOY_VAL_accuracy"]
    lines = [json.loads(line) for line in (tmp_path / "results_eval_linear.jsonl").read_text().splitlines()]
    assert {line["best_classifier"] for line in lines[-3:]} == {results["best_classifier"]}
    assert set(lines[-1]["scores"]) > {results["best_classifier"]}
    name = as_file_name(dataset)
    scores, target = (np.load(tmp_path / f"{kind}_{name}.npy") for kind in ("preds", "target"))
    assert (target == toy.Images("test_with", 60).labels).all()
    assert 100 * (scores.argmax(axis=1) == target).mean() == pytest.approx(results[f"{dataset}_accuracy"], rel=1e-6)


def test_file_names_of_datasets() -> None:
    assert as_file_name("TOY_TEST") == "TOY_TEST"
    names = [as_file_name(f"ImageFolder:root=/a{c}b") for c in "/_"]
    assert len(set(names)) == 2 and not any("/" in name or ":" in name for name in names)


def test_two_metrics_on_one_dataset(tmp_path: Path) -> None:
    types = [ClassificationMetricType.MEAN_PER_CLASS_ACCURACY, ClassificationMetricType.PER_CLASS_ACCURACY]
    results = toy.run(
        toy.make_config(tmp_path, eval__test_datasets=["TOY_VAL", "TOY_TEST"], eval__test_metric_types=types)
    )
    assert {"TOY_VAL_accuracy", "TOY_VAL_mean_per_class_accuracy_accuracy", "TOY_TEST_accuracy"} <= set(results)
    per_class = np.load(tmp_path / "per_class-TOY_TEST.npy")
    assert 100 * per_class.mean() == pytest.approx(results["TOY_TEST_accuracy"], rel=1e-5)


def test_few_shot_tries_are_averaged(tmp_path: Path) -> None:
    options: dict[str, Any] = {"few_shot__enable": True, "few_shot__k_or_percent": 5}
    results = toy.run(toy.make_config(tmp_path, few_shot__n_tries=3, **options))
    assert list(results) == ["TOY_VAL_accuracy_mean", "TOY_VAL_accuracy_std"]
    first = toy.run(toy.make_config(tmp_path / "one", few_shot__n_tries=1, **options))
    lines = [json.loads(line) for line in (tmp_path / "results_eval_linear.jsonl").read_text().splitlines()]
    final = [100 * line["accuracy"] for line in lines if line["iteration"] == 12]
    assert len(final) == 3 and final[0] == pytest.approx(first["TOY_VAL_accuracy"])
    assert results["TOY_VAL_accuracy_mean"] == pytest.approx(np.mean(final))
    assert results["TOY_VAL_accuracy_std"] == pytest.approx(np.std(final, ddof=1))


def replace(monkeypatch: pytest.MonkeyPatch, name: str, dataset: Any) -> None:
    def make(*, dataset_str: str, **_: Any) -> Any:
        return dataset if dataset_str.startswith(name) else toy.make_images(dataset_str=dataset_str)

    monkeypatch.setattr(data, "make_dataset", make)


class Lists(toy.Images):
    """Every third image has no class, its own, or its own and the next."""

    def get_target(self, index: int) -> Any:
        own = int(self.labels[index])
        return [[], [own], [own, (own + 1) % toy.N_CLASSES]][index % 3]

    def get_targets(self) -> Any:
        return [self.get_target(index) for index in range(len(self))]


def test_any_of_several_classes_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "lists", Lists("lists", 30))
    types = [ClassificationMetricType.ANY_MATCH_ACCURACY]
    config = toy.make_config(tmp_path, eval__test_datasets=["lists"], eval__test_metric_types=types, save_results=True)
    results = toy.run(config)
    predicted = np.load(tmp_path / "preds_lists.npy").argmax(axis=1)
    targets = [Lists("lists", 30).get_target(index) for index in range(30)]
    right = [best in classes for best, classes in zip(predicted, targets, strict=True) if classes]
    assert results["lists_accuracy"] == pytest.approx(100 * np.mean(right))
    assert (np.load(tmp_path / "target_lists.npy")[0] == -1).all()


def test_classes_of_another_label_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mapped(toy.Images):
        def get_imagenet_class_mapping(self) -> list[int]:
            return [4, 1, 3]

    dataset = Mapped("mapped", 24)
    dataset.labels = dataset.labels % 3
    replace(monkeypatch, "mapped", dataset)
    toy.run(toy.make_config(tmp_path, eval__test_datasets=["mapped"], save_results=True))
    assert np.load(tmp_path / "preds_mapped.npy").shape == (24, 3)


def test_corruptions_are_better_when_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Corrupted(toy.Images):
        def get_targets(self) -> Any:
            return np.stack([self.labels, np.arange(len(self)) % 19, np.arange(len(self)) % 5 + 1], axis=1)

        def get_target(self, index: int) -> Any:
            return self.get_targets()[index]

    replace(monkeypatch, "corrupted", Corrupted("corrupted", 95))
    metric = ClassificationMetricType.IMAGENET_C_METRIC
    config = toy.make_config(tmp_path, train__val_dataset="corrupted", train__val_metric_type=metric)
    results = toy.run(config)
    last = json.loads((tmp_path / "results_eval_linear.jsonl").read_text().splitlines()[-1])
    errors = {name: values["top-1"] for name, values in last["scores"].items()}
    assert results["best_classifier"] == min(errors, key=lambda name: errors[name])
    assert results["corrupted_accuracy"] == pytest.approx(100 * min(errors.values()))


class MultiHot(toy.Images):
    def __init__(self, name: str, size: int) -> None:
        super().__init__(name, size)
        self.labels = np.eye(toy.N_CLASSES, dtype=np.int64)[self.labels]


def test_multi_hot_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "multi", MultiHot("multi", 60))
    options: dict[str, Any] = {
        "train__dataset": "multi",
        "train__val_dataset": "multi",
        "train__val_metric_type": ClassificationMetricType.MEAN_AVERAGE_PRECISION_VOC_2007,
    }
    loss = LossType.BINARY_CROSS_ENTROPY
    assert toy.run(toy.make_config(tmp_path, train__loss_type=loss, **options))["multi_accuracy"] > 30
    with pytest.raises(ValueError, match=r"loss_type=CROSS_ENTROPY.*multi-hot"):
        toy.run(toy.make_config(tmp_path / "wrong", **options))


@pytest.mark.parametrize(
    "name, labels, message",
    [
        ("TOY_TRAIN", [0] * 8, "all 8 training images are of class 0"),
        ("TOY_TRAIN", [], "is empty"),
        ("TOY_VAL", [0, 1, 2, 9], "class 9.*only 6"),
        ("TOY_VAL", [[0, 1]] * 4, "MEAN_ACCURACY needs one class per image"),
        ("TOY_VAL", [], "is empty"),
    ],
    ids=["single class", "empty train", "unknown class", "multi-hot", "empty val"],
)
def test_datasets_that_cannot_be_used_are_refused_before_any_image_is_seen(
    name: str, labels: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = toy.Images(name, len(labels))
    dataset.labels = np.asarray(labels)
    replace(monkeypatch, name, dataset)
    model = toy.Backbone()
    with pytest.raises(ValueError, match=message):
        toy.run(toy.make_config(tmp_path), model)
    assert model.n_seen == 0


class Unlabelled(toy.Images):
    def get_target(self, index: int) -> Any:
        return None

    def get_targets(self) -> Any:
        return None


@pytest.mark.parametrize("name", ["TOY_TRAIN", "TOY_VAL", "TOY_TEST"])
def test_datasets_without_labels(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, name, Unlabelled(name, 10))
    with pytest.raises(ValueError, match="no labels"):
        toy.run(toy.make_config(tmp_path, eval__test_datasets=["TOY_TEST"]))


def test_classes_with_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*, dataset_str: str, **_: Any) -> Any:
        dataset: Any = toy.make_images(dataset_str=dataset_str)
        dataset.classes = ["cat", "dog" if dataset_str == "TOY_TRAIN" else "eel"]
        return dataset

    monkeypatch.setattr(data, "make_dataset", make)
    with pytest.raises(
        ValueError, match="1 of the 2 classes of TOY_VAL are not in the training set, the first is 'eel'"
    ):
        toy.run(toy.make_config(tmp_path))


def test_backbone_that_gives_nan(tmp_path: Path) -> None:
    model = toy.Backbone()
    torch.nn.init.constant_(model.layers[0].weight, float("nan"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN or infinite"):
        toy.run(toy.make_config(tmp_path, train__augment=False), model)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train__learning_rates": []}, "learning_rates"),
        ({"train__learning_rates": [0.1, -1.0]}, "learning_rates"),
        ({"train__n_last_blocks_list": [0]}, "n_last_blocks_list"),
        ({"train__n_last_blocks_list": [1, 1]}, "occurs twice"),
        ({"train__epochs": 0}, "train.epochs=0"),
        ({"train__batch_size": 0}, "batch_size"),
        ({"train__save_checkpoint_iterations": 0}, "save_checkpoint_iterations"),
        ({"eval__test_metric_types": [ClassificationMetricType.AUROC] * 2}, "test_metric_types has 2 entries for 0"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy.make_config("", **options)


def test_few_passes_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warned(**options: Any) -> bool:
        caplog.clear()
        with caplog.at_level("WARNING", logger="dinov3"):
            config = linear_training.resolve_epoch_length(toy.make_config("", **options).train, 900)
        assert config.epoch_length == (57 if options["train__epoch_length"] is None else 4)
        return any("passes over the training images" in record.getMessage() for record in caplog.records)

    assert warned(train__epoch_length=4)
    assert not warned(train__epoch_length=None)


def test_many_passes_over_few_images_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="dinov3"):
        linear_training.resolve_epoch_length(toy.make_config("", train__epoch_length=1250).train, 90)
    assert "1250 steps of 16 images are 222 passes over the training images" in caplog.text


def test_grid_is_printed_with_the_chosen_classifier_marked() -> None:
    config = toy.make_config("", train__learning_rates=[0.1, 1.0, 10.0]).train
    names = classifier_names([(n, rate * 16 / 256) for n in (1, 2) for rate in (0.1, 1.0, 10.0)])
    scores = dict(zip(names, (10.0, 20.5, 30.0, 5.0, 99.25), strict=False))  # the last one diverged
    assert format_grid(scores, config, names[4]).splitlines() == [
        "      rate    of 256    1 block    2 blocks",
        "   0.00625       0.1      10.00        5.00",
        "    0.0625         1      20.50       99.25*",
        "     0.625        10      30.00    diverged",
    ]


@pytest.mark.parametrize("place, end", [(0, "smallest"), (1, None), (2, "largest"), (3, "smallest"), (5, "largest")])
def test_best_rate_at_an_end_of_the_grid_is_warned_of(
    place: int, end: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    config = toy.make_config("", train__learning_rates=[0.1, 1.0, 10.0]).train
    names = classifier_names([(n, rate * 16 / 256) for n in (1, 2) for rate in (0.1, 1.0, 10.0)])
    with caplog.at_level("WARNING", logger="dinov3"):
        warn_if_at_end(names[place], config)
    assert (f"the {end} of train.learning_rates is best" in caplog.text) if end else not caplog.records


def test_one_classifier_of_a_checkpoint(tmp_path: Path) -> None:
    toy.run(toy.make_config(tmp_path, train__checkpoint_retention_policy=KEEP))
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "final" / "checkpoint.pth")
    state = linear.export_classifier(checkpoint, "classifier_1_blocks_avgpool_True_lr_0_06250")
    torch.nn.Linear(16, toy.N_CLASSES).load_state_dict(state)
    with pytest.raises(ValueError, match=r"no classifier 'nope'.*classifier_1_blocks"):
        linear.export_classifier(checkpoint, "nope")


def test_classifier_inputs_are_those_of_the_tokens() -> None:
    model = ModelWithIntermediateLayers(toy.Backbone(), 2, torch.no_grad)
    images = toy.Images("x", 3).samples
    got = LinearInputs(model, 2)(images)
    assert torch.equal(got, create_linear_input(model(images), 2, True))
    assert torch.equal(got[:, -16:], create_linear_input(model(images), 1, True))


def test_nothing_temporary_stays(tmp_path: Path) -> None:
    stale = tmp_path / "checkpoints" / ".tmp-9-0123abcd"
    stale.mkdir(parents=True)
    toy.run(toy.make_config(tmp_path, train__checkpoint_retention_policy=KEEP))
    assert list(tmp_path.rglob(".tmp*")) == []
