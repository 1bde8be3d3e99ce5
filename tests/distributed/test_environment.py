from __future__ import annotations

import os
from pathlib import Path

import pytest

from dinov3.distributed import TorchDistributedEnvironment, slurm

LAUNCHER_PREFIXES = ("SLURM_", "SUBMITIT_", "TORCHELASTIC_")
EXPORTED = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM_TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_JOB_NODELIST": "n1",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(LAUNCHER_PREFIXES) or name in EXPORTED:
            monkeypatch.delenv(name)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)


def set_variables(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_shell_inside_a_slurm_allocation_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, **{name: v for name, v in SLURM_TASK.items() if name != "SLURM_STEP_ID"})
    environment = TorchDistributedEnvironment()
    assert (environment.job_type, environment.rank, environment.world_size) == ("manual", 0, 1)


@pytest.mark.parametrize(
    "variables, expected",
    [({"SLURM_STEP_NUM_TASKS": "6"}, 6), ({"SLURM_TASKS_PER_NODE": "2(x3),1"}, 7), ({"SLURM_TASKS_PER_NODE": "4"}, 4)],
)
def test_slurm_task_count_without_ntasks(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: int
) -> None:
    set_variables(monkeypatch, **(SLURM_TASK | variables))
    monkeypatch.delenv("SLURM_NTASKS")
    assert TorchDistributedEnvironment().world_size == expected


def test_missing_slurm_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, **SLURM_TASK)
    monkeypatch.delenv("SLURM_NTASKS")
    with pytest.raises(RuntimeError, match="SLURM_NTASKS"):
        TorchDistributedEnvironment()
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.delenv("SLURM_PROCID")
    with pytest.raises(RuntimeError, match="SLURM_PROCID"):
        TorchDistributedEnvironment()


def test_step_on_some_of_the_nodes_meets_on_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_STEP_NODELIST": "n[3-4]", "SLURM_STEP_NUM_NODES": "2"}
    set_variables(monkeypatch, **(SLURM_TASK | {"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_JOB_NUM_NODES": "4"} | step))
    environment = TorchDistributedEnvironment()
    assert (environment.master_addr, environment.local_world_size) == ("n3", 4)


def test_contradicting_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, **(SLURM_TASK | {"SLURM_PROCID": "8"}))
    with pytest.raises(RuntimeError, match="rank 8 of 8"):
        TorchDistributedEnvironment()


def test_submitit_local_executor_gives_each_task_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(
        monkeypatch,
        SUBMITIT_EXECUTOR="local",
        SUBMITIT_LOCAL_JOB_ID="4711",
        SUBMITIT_LOCAL_NTASKS="2",
        SUBMITIT_LOCAL_JOB_NUM_NODES="1",
        SUBMITIT_LOCAL_NODEID="0",
        SUBMITIT_LOCAL_GLOBALID="1",
        SUBMITIT_LOCAL_LOCALID="1",
    )
    environment = TorchDistributedEnvironment()
    assert (environment.rank, environment.world_size, environment.local_rank) == (1, 2, 1)
    assert environment.master_addr == "127.0.0.1"


def test_ports_to_try_begin_with_the_published_one_and_yield_to_master_port(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, **SLURM_TASK)
    environment = TorchDistributedEnvironment()
    ports = environment.candidate_ports
    assert ports[0] == environment.master_port and len(set(ports)) == len(ports) > 1
    assert all(20000 <= port <= 60000 for port in ports)
    monkeypatch.setenv("MASTER_PORT", "29999")
    assert TorchDistributedEnvironment().candidate_ports == [29999]


def test_exported_port_leaves_the_other_ports_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, **SLURM_TASK)
    environment = TorchDistributedEnvironment()
    monkeypatch.setenv("MASTER_PORT", str(environment.master_port))
    assert TorchDistributedEnvironment().candidate_ports == environment.candidate_ports


def test_submitit_debug_job_in_a_slurm_task_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, **SLURM_TASK, SUBMITIT_DEBUG_JOB_ID="DEBUG_1")
    assert TorchDistributedEnvironment().world_size == 1


@pytest.mark.parametrize(
    "text, names",
    [
        ("n1", ["n1"]),
        ("node[01-03,7],login", ["node01", "node02", "node03", "node7", "login"]),
        ("rack[1-2]n[09-10]x", ["rack1n09x", "rack1n10x", "rack2n09x", "rack2n10x"]),
    ],
)
def test_node_lists_expand(text: str, names: list[str]) -> None:
    assert slurm.expand_node_list(text) == names


def test_export_refuses_to_overwrite_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, **SLURM_TASK, WORLD_SIZE="3")
    for name in EXPORTED:
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored after the test
        if name != "WORLD_SIZE":
            monkeypatch.delenv(name)
    environment = TorchDistributedEnvironment()
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE=3 \(not 8\)"):
        environment.export(overwrite=False)
    assert "RANK" not in os.environ
    environment.export(overwrite=True)
    exported = {name: os.environ[name] for name in EXPORTED}
    assert exported == {
        "MASTER_ADDR": "n1",
        "MASTER_PORT": str(environment.master_port),
        "RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
    }


def test_a_scontrol_that_knows_no_cluster_is_not_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho no configuration >&2\nexit 1\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert slurm.hostnames("node[01-02],login") == ["node01", "node02", "login"]
