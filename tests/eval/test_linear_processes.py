"""Linear probing in several processes gives the files and figures of one with the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.eval.classification import data
from dinov3.eval.classification.linear_config import RESULTS_FILENAME
from dinov3.eval.classification.linear_training import read_checkpoint
from dinov3.eval.command.results import write_results
from tests.multiprocess import run_ranks

from . import linear_toy as toy

#: Augmented images, kept features, few-shot tries, and sizes that no number of processes divides.
EVALUATIONS: dict[str, dict[str, Any]] = {
    "augmented": {"train__dataset": "jitter:91"},
    "kept": {"train__dataset": "train:91", "train__augment": False, "eval__batch_size": 5},
    "few_shot": {"few_shot__enable": True, "few_shot__k_or_percent": 4, "few_shot__n_tries": 2},
}
GLOBAL_BATCH = 12


def evaluate_all(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    data.make_dataset = toy.make_images  # type: ignore[assignment]
    results = {}
    for name, options in EVALUATIONS.items():
        config = toy.make_config(
            root / name,
            save_results=True,
            train__batch_size=GLOBAL_BATCH // world_size,
            train__val_dataset="val:47",
            train__checkpoint_retention_policy=CheckpointRetentionPolicy.ALL,
            eval__test_datasets=["test:9"],
            **options,
        )
        results[name] = toy.run(config)
        write_results(results[name], config.output_dir, RESULTS_FILENAME)
    return results


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_give_the_files_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.use_images(monkeypatch)
    want = evaluate_all(0, 1, tmp_path / "one")
    for results in run_ranks(evaluate_all, 2, tmp_path / "many"):
        assert results == want
    for name in EVALUATIONS:
        one, many = (
            {str(path.relative_to(tmp_path / d)): path for path in (tmp_path / d / name).rglob("*") if path.is_file()}
            for d in ("one", "many")
        )
        assert one.keys() == many.keys()
        for file, path in one.items():
            if path.name == "checkpoint.pth":
                weights = (read_checkpoint(p)["linear_classifiers"] for p in (path, many[file]))
                for tensor, other in zip(*(w.values() for w in weights), strict=True):
                    torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-5)
            elif path.suffix != ".npy":
                assert path.read_text() == many[file].read_text()
