"""Several processes give the files and figures of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.eval.classification import data, neighbours
from dinov3.eval.classification.knn_config import RESULTS_FILENAME
from dinov3.eval.classification.metrics import ClassificationMetricType, build_classification_metric
from dinov3.eval.command.results import write_results
from dinov3.eval.features.accumulators import ResultsAccumulator
from dinov3.eval.features.extraction import extract_features
from tests.multiprocess import run_ranks

from . import toy

#: Everything; training rows divided; fewer test images than fill a batch of each process; fewer images than processes.
EVALUATIONS: dict[str, dict[str, Any]] = {
    "replicated": {"eval__test_metric_type": ClassificationMetricType.MEAN_PER_CLASS_ACCURACY},
    "divided": {"train__memory_budget_mb": 0.001},
    "padding": {"test": "test:9", "eval__batch_size": 4, "train__memory_budget_mb": 0.001},
    "tiny": {"train": "train:7", "test": "test:2", "train__memory_budget_mb": 0.0001, "train__ks": [1, 50]},
    "few_shot": {
        "few_shot__enable": True,
        "few_shot__k_or_percent": 3,
        "few_shot__n_tries": 3,
        "train__memory_budget_mb": 0.001,
    },
}


def evaluate_all(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    data.make_dataset = toy.make_vectors  # type: ignore[assignment]
    results = {}
    for name, options in EVALUATIONS.items():
        config = toy.make_config(root / name, **options)
        results[name] = toy.run(config)
        write_results(results[name], config.output_dir, RESULTS_FILENAME)
    return results


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


def work(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    check_parts(rank, world_size)
    return evaluate_all(rank, world_size, root)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_give_the_files_of_one(world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.use_vectors(monkeypatch)
    want = evaluate_all(0, 1, tmp_path / "one")
    for results in run_ranks(work, world_size, tmp_path / "many"):
        assert results == want
    for name in EVALUATIONS:
        one, many = ({path.name: path for path in (tmp_path / d / name).iterdir()} for d in ("one", "many"))
        assert one.keys() == many.keys()
        for file, path in one.items():
            if path.suffix == ".npy":
                np.testing.assert_allclose(np.load(path), np.load(many[file]), atol=1e-6)
            else:
                assert path.read_text() == many[file].read_text()
