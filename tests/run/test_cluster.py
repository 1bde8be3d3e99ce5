from __future__ import annotations

import os
from pathlib import Path

import pytest

from dinov3.utils import cluster


def test_parameters_without_gpus_are_one_task_and_no_request() -> None:
    assert cluster.get_slurm_executor_parameters(2, 0) == {"mem_gb": 0, "tasks_per_node": 1, "nodes": 2}


def test_overrides_replace_and_none_takes_away() -> None:
    parameters = cluster.get_slurm_executor_parameters(1, 8, tasks_per_node=2, mem_gb=None, slurm_qos=None)
    assert parameters == {"gpus_per_node": 8, "tasks_per_node": 2, "nodes": 1}


@pytest.mark.parametrize(
    "answer, status, expected",
    [("Slurmctld(primary) at n1 is UP", 0, True), ("Slurmctld(primary) at n1 is DOWN", 0, False), ("", 1, False)],
)
def test_slurm_is_there_if_its_controller_answers(
    answer: str, status: int, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not cluster.slurm_answers(), "there is no scontrol yet"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho '{answer}'\nexit {status}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    assert cluster.slurm_answers() is expected
