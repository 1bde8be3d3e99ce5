"""Golden cases of logging, checkpoint directories and launch environments."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dinov3.checkpointer import find_all_checkpoints, find_latest_checkpoint, keep_last_n_checkpoints
from dinov3.distributed import TorchDistributedEnvironment, slurm
from dinov3.logging import MetricLogger, SmoothedValue

from . import golden


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SUBMITIT_", "TORCHELASTIC_")) or name in exported:
            monkeypatch.delenv(name)


@pytest.mark.parametrize("case", golden.cases("trainer", "env-"), ids=lambda case: case["id"])
@pytest.mark.parametrize("has_scontrol", [True, False])
def test_environment(
    case: dict[str, Any], has_scontrol: bool, monkeypatch: pytest.MonkeyPatch, bare_environment: None
) -> None:
    for name, value in case["env"].items():
        monkeypatch.setenv(name, value)
    expand = case["hostnames"].__getitem__ if has_scontrol else slurm.expand_node_list
    monkeypatch.setattr(slurm, "hostnames", expand)
    environment = TorchDistributedEnvironment()
    expected = dict(case["expect"])
    text, port = expected.pop("text"), expected.pop("master_port")
    assert {name: getattr(environment, name) for name in expected} == expected
    if text is not None:
        assert str(environment) == text
    if isinstance(port, int):
        assert environment.master_port == port
    else:
        assert 1024 <= environment.master_port < 2**16


@pytest.mark.parametrize("case", golden.cases("trainer", "smoothed-value"), ids=lambda case: case["id"])
def test_smoothed_value(case: dict[str, Any]) -> None:
    meter = SmoothedValue(window_size=case["window_size"])
    for value in case["values"]:
        meter.update(value)
    expected = dict(case["expect"])
    assert str(meter) == expected.pop("str")
    assert {name: getattr(meter, name) for name in expected} == pytest.approx(expected, rel=1e-6)


def test_metric_file(tmp_path: Path) -> None:
    case = golden.case("trainer", "metric-file")
    metrics = MetricLogger(output_file=tmp_path / "metrics.json")
    iterations = metrics.log_every(range(100), 10, header="Training", n_iterations=26, start_iteration=3)
    # The case ends inside the last iteration, so that its line is not there.
    for update, _ in zip(case["updates"], iterations, strict=False):
        metrics.update(**update)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert len(lines) == len(case["expect"]["lines"])
    for line, expected in zip(lines, case["expect"]["lines"], strict=True):
        assert list(line) == list(expected)
        for name, value in expected.items():
            if value == "seconds":
                assert 0 <= line[name] < 60
            else:
                assert line[name] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("case", golden.cases("trainer", "checkpoint-dirs"), ids=lambda case: case["id"])
def test_checkpoint_directories(case: dict[str, Any], tmp_path: Path) -> None:
    for name in case["directories"]:
        (tmp_path / name).mkdir()
    expected = case["expect"]
    assert [path.name for path in find_all_checkpoints(tmp_path)] == expected["find_all"]
    latest = find_latest_checkpoint(tmp_path)
    assert (latest.name if latest else None) == expected["find_latest"]
    keep_last_n_checkpoints(tmp_path, case["keep_last_n"])
    assert sorted(path.name for path in tmp_path.iterdir()) == expected["left"]
