"""k-NN and logistic regression in several processes give the files and figures of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.eval.classification import data, neighbours
from dinov3.eval.classification.data import SubsetEx, extract_features_for_dataset_dict
from dinov3.eval.classification.log_regression_config import Solver
from dinov3.eval.classification.metrics import ClassificationMetricType, build_classification_metric
from dinov3.eval.command.model import FrozenBackbone
from dinov3.eval.features.cache import FeatureStore
from dinov3.eval.features.extraction import (
    ResultsAccumulator,
    extract_features,
    extract_rows,
    gather_rows,
    make_enumerated_loader,
)
from dinov3.eval.log_regression import evaluate_log_regression
from tests.multiprocess import run_ranks

from . import toy
from .test_large_features import is_mapped
from .test_log_regression import FEW_SHOT, make_config

#: Everything; fewer test images than fill a batch of each process; fewer images than processes; tries. Small budgets
#: divide the training rows among the processes.
NEIGHBOURS: dict[str, dict[str, Any]] = {
    "replicated": {"eval__test_metric_type": ClassificationMetricType.MEAN_PER_CLASS_ACCURACY},
    "padding": {"test": "test:9", "eval__batch_size": 4, "train__memory_budget_mb": 0.001},
    "tiny": {"train": "train:7", "test": "test:2", "train__memory_budget_mb": 0.0001, "train__ks": [1, 50]},
    "few_shot": {
        "few_shot__enable": True,
        "few_shot__k_or_percent": 3,
        "few_shot__n_tries": 3,
        "train__memory_budget_mb": 0.001,
    },
}
#: Both solvers, metrics that count and that gather scores, a validation set, fewer test images than processes, tries.
REGRESSIONS: dict[str, dict[str, Any]] = {
    "torch": {
        "train__val_dataset": "val:60",
        "train__val_metric_type": ClassificationMetricType.MEAN_PER_CLASS_ACCURACY,
        "eval__test_metric_type": ClassificationMetricType.PER_CLASS_ACCURACY,
        "train__max_train_iters": 30,
    },
    "sklearn": {
        "train": "train:60",
        "train__solver": Solver.SKLEARN,
        "train__val_metric_type": ClassificationMetricType.AUROC,
        "train__max_train_iters": 5,
    },
    "few_shot": {**FEW_SHOT, "test": "test:2", "train__max_train_iters": 5},
}


def evaluate_all(root: Path) -> dict[str, Any]:
    data.make_dataset = toy.make_vectors  # type: ignore[assignment]
    found: dict[str, Any] = {}
    for name, options in NEIGHBOURS.items():
        found[f"knn-{name}"] = toy.run(toy.make_config(root / f"knn-{name}", **options))
    for name, options in REGRESSIONS.items():
        config = make_config(root / f"logreg-{name}", **options)
        found[f"logreg-{name}"] = evaluate_log_regression(FrozenBackbone(toy.Backbone()), config)
    return found


def check_parts(rank: int, world_size: int) -> None:
    """Search, accumulation and extraction where processes have unequal shares."""
    for n_rows, k in ((200, 15), (2, 2), (7, 7)):
        features, queries = divided_problem(n_rows)
        mine = torch.arange(rank, n_rows, world_size)
        own = queries[0:0] if rank == 0 else queries[rank - 1 :: world_size - 1]
        found = neighbours.search_sharded(own, features[mine], mine, k)
        assert torch.equal(found, neighbours.search(own, features, torch.arange(n_rows), k))

    index = torch.arange(11)[rank::world_size]
    lists = torch.full((len(index), rank + 1), -1)
    lists[:, 0] = index
    accumulator = ResultsAccumulator()
    accumulator.update(index[:, None].float(), lists, index)
    accumulated = accumulator.accumulate()
    assert accumulated["preds"][:, 0].tolist() == accumulated["target"][:, 0].tolist() == list(range(11))
    assert accumulated["target"].shape == (11, world_size)

    dataset = toy.Vectors("train", 10)
    features, labels = extract_features(nn.Identity(), dataset, 3, 0)
    assert torch.equal(features, dataset.samples) and (labels.numpy() == dataset.labels).all()

    scores, targets = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 7
    whole, part = (build_classification_metric(ClassificationMetricType.MEAN_ACCURACY, num_classes=7) for _ in "ab")
    whole.update(scores, targets)
    part.update(scores[rank::world_size], targets[rank::world_size])
    # The whole is counted once by each process, which leaves its shares as they are.
    assert part.compute() == whole.compute()


def divided_problem(n_rows: int) -> tuple[Tensor, Tensor]:
    """Features of which every row is there twice, and queries."""
    generator = torch.Generator().manual_seed(n_rows)
    features = F.normalize(torch.randn(n_rows, 12, generator=generator), dim=1)
    features[n_rows // 2 :] = features[: n_rows - n_rows // 2].clone()
    return features, F.normalize(torch.randn(21, 12, generator=generator), dim=1)


def gather_large_features(rank: int, world_size: int, directory: Path) -> None:
    """What does not fit into memory is gathered in a file."""
    dataset = toy.Vectors("train", 91)
    store = FeatureStore(directory, 1000 / 2**20, keeps_entries=False)
    rows = gather_rows(extract_rows(nn.Identity(), make_enumerated_loader(dataset, 16, 0), store=store), store)
    assert is_mapped(rows.features) and torch.equal(rows.positions, torch.arange(91))
    assert torch.equal(rows.features, dataset.samples) and rows.targets.tolist() == dataset.labels.tolist()
    tries = {0: SubsetEx(dataset, [3, 5, 90]), 1: SubsetEx(dataset, list(range(40)))}
    features = extract_features_for_dataset_dict(nn.Identity(), tries, 16, 0, True, store=store)
    for name, subset in tries.items():
        assert torch.equal(features[name]["train_features"], dataset.samples[list(subset.indices)])


def work(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    check_parts(rank, world_size)
    gather_large_features(rank, world_size, root / "store")
    return evaluate_all(root)


@pytest.mark.distributed
@pytest.mark.slow
def test_three_processes_give_the_files_and_figures_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.use_vectors(monkeypatch)
    want = evaluate_all(tmp_path / "one")
    for found in run_ranks(work, 3, tmp_path / "many"):
        for name in want:
            if name.startswith("knn"):
                assert found[name] == want[name]
            else:
                assert (found[name].metrics, found[name].details) == (want[name].metrics, want[name].details)
    for name in want:
        one, many = ({path.name: path for path in (tmp_path / d / name).iterdir()} for d in ("one", "many"))
        assert one.keys() == many.keys()
        for file, path in one.items():
            if path.suffix == ".npy":
                np.testing.assert_allclose(np.load(path), np.load(many[file]), atol=1e-6)
            elif path.suffix != ".png":
                assert path.read_text() == many[file].read_text()
