"""Linear probing that is killed, as a machine that stops would, and started again: the same result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dinov3.eval.classification.linear_training import read_checkpoint

from . import real_data

N_EPOCHS, EPOCH_LENGTH = 4, 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and images of faces and other things."""
    root = tmp_path_factory.mktemp("killed")
    real_data.write_run(root / "run")
    real_data.write_faces(root / "faces")
    return root


def command(root: Path, out: Path) -> list[str]:
    settings = [
        f"model.pretrained_weights={root}/run",
        *real_data.size_settings(),
        *(
            f"train.{key}=ImageFolder:root={root}/faces/{part}"
            for key, part in (("dataset", "train"), ("val_dataset", "test"))
        ),
        *("train.batch_size=32", f"train.epochs={N_EPOCHS}", f"train.epoch_length={EPOCH_LENGTH}"),
        *("train.learning_rates=[0.01,0.1]", "train.save_checkpoint_iterations=2", "train.eval_period_iterations=3"),
        *("train.checkpoint_retention_policy=ALL", "save_results=true", "--no-cache", f"output_dir={out}"),
    ]
    return [sys.executable, "dinov3/eval/linear.py", *settings]


def start(root: Path, out: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DINOV3_DEVICE": "cpu"}
    return subprocess.Popen(
        command(root, out), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_after_checkpoint(root: Path, out: Path, iteration: int) -> None:
    """Start, and send SIGKILL as soon as a checkpoint of this iteration or a later one appears."""
    process = start(root, out)
    wanted = [str(number) for number in range(iteration, N_EPOCHS * EPOCH_LENGTH)]
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if any((out / "checkpoints" / name / "checkpoint.pth").is_file() for name in wanted):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, output[-3000:]


def finish(root: Path, out: Path) -> str:
    process = start(root, out)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.mark.slow
def test_killed_training_ends_with_the_same_result(root: Path, tmp_path: Path) -> None:
    finish(root, tmp_path / "whole")
    for iteration in (1, 9):  # in one life and the next
        kill_after_checkpoint(root, tmp_path / "killed", iteration)
        assert not (tmp_path / "killed" / "results-linear.csv").exists()
    assert "continuing from" in finish(root, tmp_path / "killed")

    whole, killed = (
        {path.relative_to(tmp_path / name): path for path in (tmp_path / name).rglob("*")}
        for name in ("whole", "killed")
    )
    assert {name for name in whole if "logs" not in name.parts} == {name for name in killed if "logs" not in name.parts}
    for name, path in whole.items():
        if name.suffix == ".pth":
            weights, others = (read_checkpoint(p)["linear_classifiers"] for p in (path, killed[name]))
            assert all(torch.equal(others[key], tensor) for key, tensor in weights.items())
        elif name.suffix in (".csv", ".jsonl", ".npy") or name.name == "results_eval_linear.json":
            assert path.read_bytes() == killed[name].read_bytes()
    results = [
        json.loads((tmp_path / name / "results-linear.json").read_text())["results"] for name in ("whole", "killed")
    ]
    assert results[0] == results[1]
