"""Logistic regression in several processes gives the files and figures of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinov3.eval import log_regression
from dinov3.eval.classification import data
from dinov3.eval.classification.log_regression_config import RESULTS_FILENAME, Solver
from dinov3.eval.classification.metrics import ClassificationMetricType
from dinov3.eval.command.model import FrozenBackbone
from dinov3.eval.command.results import write_results
from tests.multiprocess import run_ranks

from . import toy
from .test_log_regression import FEW_SHOT, make_config

#: Both solvers, a validation set; fewer test images than processes; few-shot.
EVALUATIONS: dict[str, dict[str, Any]] = {
    "torch": {"train__val_dataset": "val:60"},
    "sklearn": {"train__solver": Solver.SKLEARN, "train__max_train_iters": 30},
    "per_class": {
        "eval__test_metric_type": ClassificationMetricType.PER_CLASS_ACCURACY,
        "train__val_metric_type": ClassificationMetricType.MEAN_PER_CLASS_ACCURACY,
    },
    "curves": {
        "eval__test_metric_type": ClassificationMetricType.AUROC,
        "train__val_metric_type": ClassificationMetricType.AUROC,
        "train__max_train_iters": 10,
    },
    "tiny": {"test": "test:2", "train__max_train_iters": 10},
    "few_shot": {"train": "train:240", **FEW_SHOT},
}


def evaluate_all(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    data.make_dataset = toy.make_vectors  # type: ignore[assignment]
    results = {}
    for name, options in EVALUATIONS.items():
        config = make_config(root / name, **options)
        found, _, sweeps = log_regression._fit_and_score(FrozenBackbone(toy.Backbone()), config)
        results[name] = (found, sweeps)
        write_results(found, config.output_dir, RESULTS_FILENAME)
    return results


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_give_the_files_of_one(world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "make_dataset", toy.make_vectors)
    want = evaluate_all(0, 1, tmp_path / "one")
    for results in run_ranks(evaluate_all, world_size, tmp_path / "many"):
        assert results == want
    for name in EVALUATIONS:
        one, many = ({path.name: path for path in (tmp_path / d / name).iterdir()} for d in ("one", "many"))
        assert one.keys() == many.keys()
        for file, path in one.items():
            if path.suffix == ".npy":
                np.testing.assert_allclose(np.load(path), np.load(many[file]), atol=1e-6)
            else:
                assert path.read_text() == many[file].read_text()
