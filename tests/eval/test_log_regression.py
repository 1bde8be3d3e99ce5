"""The logistic regression evaluation: models on features, and from datasets to files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dinov3.eval import log_regression
from dinov3.eval.classification import data
from dinov3.eval.classification.config import FewShotConfig
from dinov3.eval.classification.log_regression_config import (
    RESULTS_FILENAME,
    EvalConfig,
    LogregEvalConfig,
    Solver,
    TrainConfig,
)
from dinov3.eval.classification.log_regression_module import (
    C_VALUES,
    LogRegModule,
    Sweep,
    get_best_logreg_with_features,
    sweep_C_values,
)
from dinov3.eval.classification.log_regression_plot import format_sweep, write_sweeps
from dinov3.eval.classification.metrics import ClassificationMetricType, build_classification_metric
from dinov3.eval.command import command_line
from dinov3.eval.command.config import parse_arguments
from dinov3.eval.command.model import FrozenBackbone, ModelConfig
from dinov3.eval.command.results import as_file_name
from dinov3.eval.features.cache import FeaturesConfig

from . import toy

FEW_SHOT: dict[str, Any] = {
    "few_shot__enable": True,
    "few_shot__k_or_percent": 4,
    "few_shot__n_tries": 3,
    "train__max_train_iters": 20,
}


@pytest.fixture(autouse=True)
def vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "make_dataset", toy.make_vectors)


def make_config(
    output_dir: Any, *, train: str = "train:120", test: str = "test:50", **sections: Any
) -> LogregEvalConfig:
    """A configuration without loader processes or cache, and of few steps; arguments such as `train__tol` set keys."""
    options: dict[str, dict[str, Any]] = {"train": {}, "eval": {}, "few_shot": {}, "features": {}}
    for name, value in sections.items():
        section, _, key = name.partition("__")
        options[section][key] = value
    return LogregEvalConfig(
        model=ModelConfig(),
        train=TrainConfig(
            **{"dataset": train, "num_workers": 0, "batch_size": 16, "solver": Solver.TORCH, "max_train_iters": 30}
            | options["train"]
        ),
        eval=EvalConfig(**{"test_dataset": test, "num_workers": 0} | options["eval"]),
        few_shot=FewShotConfig(**options["few_shot"]),
        features=FeaturesConfig(**{"cache": False} | options["features"]),
        save_results=True,
        output_dir=str(output_dir),
    )


def run(config: LogregEvalConfig, model: nn.Module | None = None) -> dict[str, float]:
    """Evaluate the toy backbone."""
    return log_regression.eval_log_regression_with_model(
        model=model or toy.Backbone(), autocast_dtype=torch.float32, config=config
    )


def features_of(name: str, size: int) -> tuple[Tensor, Tensor]:
    dataset = toy.Vectors(name, size)
    with torch.no_grad():
        return toy.Backbone()(dataset.samples), torch.as_tensor(dataset.labels)


def config_of(solver: Solver = Solver.TORCH, **options: Any) -> TrainConfig:
    return TrainConfig(dataset="", solver=solver, **options)


# Models on features


@pytest.mark.parametrize("solver", [Solver.TORCH, Solver.SKLEARN])
@pytest.mark.parametrize("n_classes", [2, 6])
def test_predictions_are_those_of_scikit_learn(solver: Solver, n_classes: int) -> None:
    from sklearn.linear_model import LogisticRegression

    features, labels = features_of("train", 200)
    queries, _ = features_of("test", 500)
    labels = labels % n_classes
    for C in (1e-3, 0.1, 5.0):
        want = LogisticRegression(C=C, tol=1e-10, max_iter=5000).fit(features.double().numpy(), labels.numpy())
        module = LogRegModule(C, logreg_config=config_of(solver)).fit(features, labels)
        preds = module(queries)["preds"]
        assert preds.dtype == torch.float64
        np.testing.assert_allclose(preds.numpy(), want.predict_proba(queries.double().numpy()), atol=1e-4)
        assert (preds.argmax(dim=1).numpy() == want.predict(queries.double().numpy())).mean() >= 0.998


@pytest.mark.parametrize("solver", [Solver.TORCH, Solver.SKLEARN])
def test_columns_of_multi_hot_labels_that_never_change_are_certain(solver: Solver) -> None:
    features, labels = features_of("train", 60)
    columns = torch.stack([labels == 0, labels < 0, labels >= 0, labels > 3], dim=1).long()
    preds = LogRegModule(1.0, True, logreg_config=config_of(solver)).fit(features, columns)(features)["preds"]
    assert (preds[:, 1] == 0).all() and (preds[:, 2] == 1).all()
    single = LogRegModule(1.0, logreg_config=config_of(solver)).fit(features, columns[:, 3])(features)["preds"]
    torch.testing.assert_close(preds[:, 3], single[:, 1], rtol=1e-3, atol=1e-4)


def test_both_solvers_choose_alike() -> None:
    train_features, train_labels = features_of("train", 200)
    val_features, val_labels = features_of("val", 300)
    sweeps = {}
    for solver in (Solver.TORCH, Solver.SKLEARN):
        sweeps[solver] = sweep_C_values(
            train_features=train_features,
            train_labels=train_labels,
            val_features=val_features,
            val_labels=val_labels,
            val_metric=build_classification_metric(ClassificationMetricType.MEAN_ACCURACY, num_classes=6),
            train_config=config_of(solver),
        )
    ours, theirs = ([values["top-1"] for values in sweep.metrics] for sweep in sweeps.values())
    assert ours == pytest.approx(theirs, abs=1.01 / 300)
    assert max(ours) == pytest.approx(max(theirs), abs=1e-6)
    assert len(set(ours)) > 5


def test_smallest_of_equally_good_values_is_chosen() -> None:
    features = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    model = get_best_logreg_with_features(
        train_features=features,
        train_labels=torch.tensor([0, 0, 1, 1]),
        val_features=features,
        val_labels=torch.tensor([0, 0, 1, 1]),
        val_metric=build_classification_metric(ClassificationMetricType.MEAN_ACCURACY, num_classes=2),
        concatenate_train_val=True,
        train_config=config_of(),
    )
    assert model.sweep is not None
    assert [values["top-1"] for values in model.sweep.metrics] == [1.0] * 45
    assert model.sweep.best == 0
    assert pytest.approx(1e-6) == model.C


@pytest.mark.parametrize("solver", [Solver.TORCH, Solver.SKLEARN])
def test_fit_refuses_what_it_cannot_learn_from(solver: Solver) -> None:
    features, labels = features_of("train", 20)
    module = LogRegModule(1.0, logreg_config=config_of(solver))
    with pytest.raises(ValueError, match="all 20 training images are of class 3"):
        module.fit(features, torch.full((20,), 3))
    broken = features.clone()
    broken[4, 1] = broken[7, 0] = float("nan")
    with pytest.raises(ValueError, match="2 of 20 rows of features contain NaN"):
        module.fit(broken, labels)
    with pytest.raises(ValueError, match="20 rows of features and 19 labels"):
        module.fit(features, labels[1:])
    with pytest.raises(ValueError, match="expected classes"):
        module.fit(features, labels.double())
    with pytest.raises(ValueError, match="label 5 is out of range: there are only 3 classes"):
        LogRegModule(1.0, logreg_config=config_of(solver), num_classes=3).fit(features, labels)
    with pytest.raises(ValueError, match="no column"):
        LogRegModule(1.0, True, logreg_config=config_of(solver)).fit(features, torch.ones(20, 2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="not fitted"):
        module(features)


def test_limit_of_iterations_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    features, labels = features_of("train", 100)
    with caplog.at_level("WARNING", logger="dinov3"):
        sweep_C_values(
            train_features=features,
            train_labels=labels,
            val_features=features,
            val_labels=labels,
            val_metric=build_classification_metric(ClassificationMetricType.MEAN_ACCURACY, num_classes=6),
            train_config=config_of(max_train_iters=3),
        )
    assert "train.max_train_iters=3" in caplog.text


# Settings


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_dtype": "float16"}, "train.train_dtype=float16"),
        ({"product_dtype": "bfloat16"}, "train.product_dtype=bfloat16"),
        ({"train_features_device": "tpu"}, "train.train_features_device=tpu"),
        ({"train_features_device": "cuda"}, "there is no GPU here"),
        ({"max_train_iters": 0}, "max_train_iters"),
        ({"tol": 0.0}, "train.tol"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**options)


def test_solver_is_torch_if_not_said_otherwise() -> None:
    assert TrainConfig(dataset="").resolved_solver() is Solver.TORCH
    assert config_of(Solver.SKLEARN).resolved_solver() is Solver.SKLEARN


def test_products_are_in_float64_where_that_takes_no_time() -> None:
    config = config_of()
    assert config.product_dtypes(1000) == [torch.float64]
    assert config.product_dtypes(10**9) == [torch.float32, torch.float64]
    assert config_of(product_dtype="float32").product_dtypes(1000) == [torch.float32]
    assert config_of(product_dtype="float64").product_dtypes(10**9) == [torch.float64]


def test_scikit_learn_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    features, labels = features_of("train", 20)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        LogRegModule(1.0, logreg_config=config_of(Solver.SKLEARN)).fit(features, labels)
    LogRegModule(1.0, logreg_config=config_of(Solver.TORCH)).fit(features, labels)


# From datasets to files


def test_results_are_those_of_the_saved_probabilities(tmp_path: Path) -> None:
    results = run(make_config(tmp_path))
    preds, target = np.load(tmp_path / "preds.npy"), np.load(tmp_path / "target.npy")
    assert preds.shape == (50, toy.N_CLASSES) and preds.dtype == np.float64
    assert (target == toy.Vectors("test", 50).labels).all()
    assert list(results) == ["top-1", "top-5"]
    assert results["top-1"] == pytest.approx(100 * (preds.argmax(axis=1) == target).mean())
    assert 40 < results["top-1"] < 100  # a guess is right in 17 %


def test_final_fit_is_on_training_and_validation_images(tmp_path: Path) -> None:
    run(make_config(tmp_path, train__val_dataset="val:60", train__max_train_iters=1000))
    train, val, test = (features_of(*part) for part in (("train", 120), ("val", 60), ("test", 50)))
    saved = torch.from_numpy(np.load(tmp_path / "preds.npy"))
    both = torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])
    differences = [
        float((LogRegModule(C, logreg_config=config_of()).fit(*both)(test[0])["preds"] - saved).abs().max())
        for C in C_VALUES
    ]
    assert min(differences) < 1e-6 and sorted(differences)[1] > 1e-4


def test_few_shot_tries_are_averaged(tmp_path: Path) -> None:
    results = run(make_config(tmp_path, train="train:240", **FEW_SHOT))
    assert list(results) == ["top-1_mean", "top-1_std", "top-5_mean", "top-5_std"]
    target = np.load(tmp_path / "target_0.npy")
    shares = [100 * (np.load(tmp_path / f"preds_{t}.npy").argmax(axis=1) == target).mean() for t in range(3)]
    assert results["top-1_mean"] == pytest.approx(np.mean(shares))
    assert results["top-1_std"] == pytest.approx(np.std(shares, ddof=1))
    assert len(set(shares)) > 1
    single = run(make_config(tmp_path / "one", train="train:240", **FEW_SHOT | {"few_shot__n_tries": 1}))
    assert single["top-1"] == pytest.approx(shares[0])


def test_images_go_through_the_model_once(tmp_path: Path) -> None:
    model = toy.Backbone()
    run(make_config(tmp_path, **FEW_SHOT), model)
    assert model.n_seen <= 120 + 50
    model = toy.Backbone()
    run(make_config(tmp_path), model)
    assert model.n_seen == 120 + 50


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (120, 2)])
def test_results_do_not_depend_on_batches_or_workers(tmp_path: Path, batch_size: int, workers: int) -> None:
    want = run(make_config(tmp_path / "one"))
    options: dict[str, Any] = {"train__num_workers": workers, "eval__num_workers": workers}
    assert run(make_config(tmp_path / "two", train__batch_size=batch_size, **options)) == want


def test_metric_may_differ_from_that_of_the_validation(tmp_path: Path) -> None:
    macro = ClassificationMetricType.MEAN_PER_CLASS_ACCURACY
    run(make_config(tmp_path / "micro"))
    results = run(make_config(tmp_path / "macro", eval__test_metric_type=macro))
    preds, target = (np.load(tmp_path / "macro" / f"{name}.npy") for name in ("preds", "target"))
    assert (preds == np.load(tmp_path / "micro" / "preds.npy")).all()
    shares = [(preds[target == c].argmax(axis=1) == c).mean() for c in range(toy.N_CLASSES)]
    assert results["top-1"] == pytest.approx(100 * np.mean(shares))


def test_shares_of_the_classes_are_written_for_each_try(tmp_path: Path) -> None:
    metric = ClassificationMetricType.PER_CLASS_ACCURACY
    run(make_config(tmp_path, eval__test_metric_type=metric, **FEW_SHOT))
    for name in range(FEW_SHOT["few_shot__n_tries"]):
        shares = np.load(tmp_path / f"per_class-{as_file_name('test:50')}_{name}.npy")
        preds, target = (np.load(tmp_path / f"{kind}_{name}.npy") for kind in ("preds", "target"))
        hits = preds.argmax(axis=1) == target
        assert shares.tolist() == pytest.approx([hits[target == c].mean() for c in range(toy.N_CLASSES)])


class Unlabelled(toy.Vectors):
    def get_target(self, index: int) -> Any:
        return None

    def get_targets(self) -> Any:
        return None


def replace_dataset(monkeypatch: pytest.MonkeyPatch, name: str, dataset: Any) -> None:
    def make(*, dataset_str: str, **_: Any) -> Any:
        return dataset if dataset_str.startswith(name) else toy.make_vectors(dataset_str=dataset_str)

    monkeypatch.setattr(data, "make_dataset", make)


def changed(name: str, size: int, change: Any) -> toy.Vectors:
    dataset = toy.Vectors(name, size)
    change(dataset)
    return dataset


def new_class(dataset: Any) -> None:
    dataset.labels[3] = 9


@pytest.mark.parametrize(
    "name, dataset, message",
    [
        ("val", Unlabelled("val", 30), "no labels"),
        ("val", changed("val", 30, new_class), "train.val_dataset has class 9.*only 6 classes"),
        ("test", toy.Vectors("test", 0), "eval.test_dataset is empty"),
        ("train", toy.Vectors("train", 0), "train.dataset is empty"),
    ],
    ids=["val labels", "val class", "no test", "no train"],
)
def test_wrong_datasets_are_refused_before_any_image_is_seen(
    name: str, dataset: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_dataset(monkeypatch, name, dataset)
    model = toy.Backbone()
    with pytest.raises(ValueError, match=message):
        run(make_config(tmp_path, train__val_dataset="val:30"), model)
    assert model.n_seen == 0
    assert not list(tmp_path.iterdir())


def test_classes_without_a_training_image_give_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def drop_class_2(dataset: Any) -> None:
        dataset.labels[dataset.labels == 2] = 4

    replace_dataset(monkeypatch, "train", changed("train", 120, drop_class_2))
    with caplog.at_level("WARNING", logger="dinov3"):
        run(make_config(tmp_path))
    assert "eval.test_dataset has 1 classes without a training image (2)" in caplog.text
    assert (np.load(tmp_path / "preds.npy")[:, 2] == 0).all()


def test_one_image_per_class_leaves_none_for_validation(tmp_path: Path) -> None:
    model = toy.Backbone()
    with pytest.raises(ValueError, match="give train.val_dataset"):
        run(make_config(tmp_path, train="train:6"), model)
    assert model.n_seen == 0
    run(make_config(tmp_path, train="train:6", train__val_dataset="val:30"))


def test_metric_that_needs_other_labels_is_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"train__val_metric_type": ClassificationMetricType.MEAN_MULTILABEL_F1}, "MEAN_MULTILABEL_F1 needs"),
        ({"train__val_metric_type": ClassificationMetricType.ANY_MATCH_ACCURACY}, "cannot choose C"),
        ({"eval__test_metric_type": ClassificationMetricType.MEAN_MULTILABEL_F1}, "MEAN_MULTILABEL_F1 needs"),
    ):
        model = toy.Backbone()
        with pytest.raises(ValueError, match=message):
            run(make_config(tmp_path, **options), model)
        assert model.n_seen == 0


def test_test_classes_may_be_a_part_of_the_training_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Part(toy.Vectors):
        """Classes 4 and 1 under the names 0 and 1."""

        def __init__(self) -> None:
            super().__init__("test", 120)
            kept = (self.labels == 4) | (self.labels == 1)
            self.samples, self.labels = self.samples[torch.from_numpy(kept)], (self.labels[kept] == 1).astype(np.int64)

        def get_imagenet_class_mapping(self) -> Any:
            return np.array([4, 1])

    run(make_config(tmp_path / "whole", test="test:120"))
    replace_dataset(monkeypatch, "test", Part())
    results = run(make_config(tmp_path / "part"))
    target = np.load(tmp_path / "whole" / "target.npy")
    want = np.load(tmp_path / "whole" / "preds.npy")[(target == 4) | (target == 1)][:, [4, 1]]
    np.testing.assert_allclose(np.load(tmp_path / "part" / "preds.npy"), want, atol=1e-9)
    assert results["top-1"] == pytest.approx(100 * (want.argmax(axis=1) == Part().labels).mean())


def test_training_images_are_looked_for_under_the_training_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Class 2 of the training set has no image; the only test class is called 0."""

    def make(*, dataset_str: str, **_: Any) -> Any:
        dataset: Any = toy.make_vectors(dataset_str=dataset_str)
        if dataset_str.startswith("test"):
            dataset.labels = np.zeros_like(dataset.labels)
            dataset.get_imagenet_class_mapping = lambda: np.array([2])
        else:
            dataset.labels[dataset.labels == 2] = 4
        return dataset

    monkeypatch.setattr(data, "make_dataset", make)
    with caplog.at_level("WARNING", logger="dinov3"):
        run(make_config(tmp_path, train__max_train_iters=2))
    assert "eval.test_dataset has 1 classes without a training image (2)" in caplog.text


# The sweep


def make_sweep() -> Sweep:
    scores = [0.2 + 0.01 * min(index, 30) for index in range(45)]
    return Sweep(
        Cs=C_VALUES,
        metrics=[{"top-1": score} for score in scores],
        n_iterations=list(range(45)),
        converged=[True] * 45,
        best=30,
    )


def test_sweep_is_written_as_table_and_picture(tmp_path: Path) -> None:
    table, picture = write_sweeps({0: make_sweep(), 1: make_sweep()}, tmp_path)
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 90 and float(rows[30]["C"]) == pytest.approx(C_VALUES[30])
    assert [index for index, row in enumerate(rows) if row["chosen"] == "1"] == [30, 75]
    assert float(rows[75]["val top-1"]) == pytest.approx(50)
    from PIL import Image

    with Image.open(picture) as image:
        assert image.size == (900, 600)
    assert sorted(path.name for path in tmp_path.iterdir()) == [table.name, picture.name]


def test_chosen_value_is_marked_in_the_printed_sweep() -> None:
    lines = format_sweep(make_sweep()).splitlines()
    assert len(lines) == 46
    assert [index for index, line in enumerate(lines) if "chosen" in line] == [31]
    assert "50.00" in lines[31]


def test_command_writes_and_prints_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "load_model", lambda _: FrozenBackbone(toy.Backbone()))
    tokens = ["model.dino_hub=dinov3_vits16", "train.dataset=train:120", "train.num_workers=0", "train.solver=torch"]
    tokens += ["eval.test_dataset=test:50", "eval.num_workers=0", "features.cache=false", f"output_dir={tmp_path}"]
    config = parse_arguments(tokens, LogregEvalConfig)
    results = command_line.run_evaluation(
        config, evaluate=log_regression.evaluate_log_regression, results_file=RESULTS_FILENAME
    )
    names = ["eval_config.yaml", "results-log-regression.csv", "results-log-regression.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *names,
        "sweep-log-regression.csv",
        "sweep-log-regression.png",
    ]
    content = json.loads((tmp_path / names[2]).read_text())
    assert content["results"] == pytest.approx(results)
    chosen = content["chosen_C"]["try 0"]
    assert chosen in content["sweep"]["C"] and len(content["sweep"]["C"]) == 45
    assert content["sweep"]["chosen"][content["sweep"]["C"].index(chosen)] == 1
    assert content["datasets"]["train"]["images"] == [108] and content["datasets"]["val"]["images"] == 12
    printed = capsys.readouterr().out
    assert "<- chosen" in printed and f"C = {chosen:.3g}" in printed and f"{results['top-1']:.2f}" in printed
