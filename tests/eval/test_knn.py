"""The k-NN evaluation from datasets to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.eval import knn
from dinov3.eval.classification import data
from dinov3.eval.classification.knn_config import Feature
from dinov3.eval.classification.knn_module import knn_accuracy
from dinov3.eval.classification.metrics import ClassificationMetricType
from dinov3.eval.classification.scoring import ModelWithPatchMean
from dinov3.eval.command.results import as_file_name

from . import toy


@pytest.fixture(autouse=True)
def vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    toy.use_vectors(monkeypatch)


def accuracy_by_hand(feature: Any) -> dict[int, float]:
    train, test = toy.Vectors("train", 120), toy.Vectors("test", 50)
    with torch.no_grad():
        features = [feature(dataset.samples) for dataset in (train, test)]
    labels = [torch.as_tensor(dataset.labels) for dataset in (train, test)]
    return knn_accuracy(features[0], labels[0], features[1], labels[1], ks=(5, 20))


@pytest.mark.parametrize("feature", list(Feature))
def test_results_are_those_of_the_features_asked_for(feature: Feature, tmp_path: Path) -> None:
    model = toy.Backbone() if feature is Feature.CLS else ModelWithPatchMean(toy.Backbone())
    want = accuracy_by_hand(model)
    results = toy.run(toy.make_config(tmp_path, eval__feature=feature))
    assert {k: results[f"{k} Top 1"] for k in (5, 20)} == pytest.approx(want)


def test_class_token_and_patch_mean_differ(tmp_path: Path) -> None:
    assert accuracy_by_hand(toy.Backbone()) != accuracy_by_hand(ModelWithPatchMean(toy.Backbone()))


def test_patch_mean_needs_patch_tokens() -> None:
    with pytest.raises(ValueError, match="Linear has no forward_features"):
        ModelWithPatchMean(nn.Linear(2, 2))


def test_images_go_through_the_model_once(tmp_path: Path) -> None:
    model = toy.Backbone()
    config = toy.make_config(
        tmp_path, few_shot__enable=True, few_shot__k_or_percent=10, few_shot__n_tries=5, train__ks=[1, 3, 5]
    )
    knn.eval_knn_with_model(model=model, autocast_dtype=torch.float32, config=config)
    assert model.n_seen <= 120 + 50


def test_standard_deviations_come_after_the_published_columns(tmp_path: Path) -> None:
    options: dict[str, Any] = {"few_shot__enable": True, "few_shot__k_or_percent": 3, "few_shot__n_tries": 3}
    results = toy.run(toy.make_config(tmp_path, **options))
    assert list(results) == [
        *("5 Top 1", "5 Top 5", "18 Top 1", "18 Top 5"),
        *("5 Top 1 std", "5 Top 5 std", "18 Top 1 std", "18 Top 5 std"),
    ]
    single = [toy.run(toy.make_config(tmp_path / "one", **options | {"few_shot__n_tries": 1}))["5 Top 1"]]
    preds = [np.load(tmp_path / f"preds_try_{t}_k_5.npy").argmax(axis=1) for t in range(3)]
    target = np.load(tmp_path / "target_try_0_k_5.npy")
    shares = [100 * float((pred == target).mean()) for pred in preds]
    assert shares[0] == pytest.approx(single[0])
    assert results["5 Top 1"] == pytest.approx(np.mean(shares), rel=1e-5)
    assert results["5 Top 1 std"] == pytest.approx(np.std(shares, ddof=1), rel=1e-4)


def test_saved_scores_and_targets_are_in_dataset_order(tmp_path: Path) -> None:
    results = toy.run(toy.make_config(tmp_path))
    scores, target = np.load(tmp_path / "preds_k_20.npy"), np.load(tmp_path / "target_k_20.npy")
    assert scores.shape == (50, toy.N_CLASSES) and scores.dtype == np.float32
    assert (target == toy.Vectors("test", 50).labels).all()
    assert 100 * (scores.argmax(axis=1) == target).mean() == pytest.approx(results["20 Top 1"])


def test_shares_of_the_classes_are_written(tmp_path: Path) -> None:
    metric = ClassificationMetricType.PER_CLASS_ACCURACY
    results = toy.run(toy.make_config(tmp_path, eval__test_metric_type=metric))
    shares = np.load(tmp_path / f"per_class-{as_file_name('test:50')}_k_20.npy")
    scores, target = np.load(tmp_path / "preds_k_20.npy"), np.load(tmp_path / "target_k_20.npy")
    hits = scores.argmax(axis=1) == target
    assert shares.tolist() == pytest.approx([hits[target == c].mean() for c in range(toy.N_CLASSES)])
    assert results["20 Top 1"] == pytest.approx(100 * shares.mean())


class Grouped(toy.Vectors):
    def get_groupby_labels(self) -> dict[str, list[str]]:
        return {"half": ["first"] * 25 + ["second"] * 25}

    def get_mapped_targets(self) -> np.ndarray:
        return self.labels[:, None]

    def __getitem__(self, index: int) -> Any:
        return self.samples[index], None


def test_groups_have_columns_behind_the_published_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_dataset(monkeypatch, "test", Grouped("test", 50))
    metric = ClassificationMetricType.GROUPBY_ANY_MATCH_ACCURACY_1
    results = toy.run(toy.make_config(tmp_path, eval__test_metric_type=metric))
    assert list(results) == ["5 Top 1", "20 Top 1", "5 first", "5 second", "20 first", "20 second"]
    assert results["5 Top 1"] == pytest.approx((results["5 first"] + results["5 second"]) / 2)


def test_lines_are_those_of_the_last_evaluation(tmp_path: Path) -> None:
    toy.run(toy.make_config(tmp_path))
    results = toy.run(toy.make_config(tmp_path))
    lines = (tmp_path / "results_eval_knn.json").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{name: value} for name, value in results.items()]


def test_more_neighbours_than_images_count_as_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dinov3"):
        results = toy.run(toy.make_config(tmp_path, train="train:15", train__ks=[3, 20, 200]))
    assert [name for name in results if name.endswith("Top 1")] == ["3 Top 1", "15 Top 1"]
    assert any("only 15 training images" in record.getMessage() for record in caplog.records)


def test_skipping_the_first_neighbour_skips_the_image_itself(tmp_path: Path) -> None:
    same: dict[str, Any] = {"train": "other:60", "test": "other:60", "train__ks": [1]}
    assert toy.run(toy.make_config(tmp_path, train__skip_first_nn=True, **same))["1 Top 1"] < 100
    copied = toy.Vectors("other", 60)
    own = F.normalize(copied.samples, dim=1)
    assert (own @ own.T).argmax(dim=1).equal(torch.arange(60)) is False  # samples with a copy find the first of the two
    assert toy.run(toy.make_config(tmp_path, **same))["1 Top 1"] > 80


@pytest.mark.parametrize("batch_size, workers, budget", [(1, 0, 512.0), (120, 0, 0.01), (33, 2, 1.0)])
def test_results_do_not_depend_on_batches_workers_or_budget(
    tmp_path: Path, batch_size: int, workers: int, budget: float
) -> None:
    want = toy.run(toy.make_config(tmp_path))
    config = toy.make_config(
        tmp_path / "other",
        train__batch_size=batch_size,
        train__num_workers=workers,
        eval__num_workers=workers,
        train__memory_budget_mb=budget,
    )
    assert toy.run(config) == want
    for k in (5, 20):
        scores = [np.load(directory / f"preds_k_{k}.npy") for directory in (tmp_path, tmp_path / "other")]
        np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)


def replace_dataset(monkeypatch: pytest.MonkeyPatch, name: str, dataset: Any) -> None:
    def make(*, dataset_str: str, **_: Any) -> Any:
        return dataset if dataset_str.startswith(name) else toy.make_vectors(dataset_str=dataset_str)

    monkeypatch.setattr(data, "make_dataset", make)


def test_backbone_runs_in_the_dtype_of_the_context(tmp_path: Path) -> None:
    seen = []

    class Watching(toy.Backbone):
        def forward(self, samples: Tensor) -> Tensor:
            features = super().forward(samples)
            seen.append(features.dtype)
            return features

    for dtype in (torch.bfloat16, torch.float32):
        knn.eval_knn_with_model(model=Watching(), autocast_dtype=dtype, config=toy.make_config(tmp_path))
        assert set(seen) == {dtype}
        seen.clear()
