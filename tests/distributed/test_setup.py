from __future__ import annotations

import builtins
import contextlib
import io
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dinov3 import distributed
from dinov3.distributed import TorchDistributedEnvironment
from dinov3.distributed import setup as distributed_setup
from tests.multiprocess import start


def report(port_attempt_timeout: float | None = None) -> str:
    """What a rank prints."""
    if port_attempt_timeout is not None:
        distributed_setup.PORT_ATTEMPT_TIMEOUT = timedelta(seconds=port_attempt_timeout)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        distributed.enable()
        total = float(distributed.all_reduce(torch.tensor(distributed.get_rank() + 1.0)))
        print("hidden unless main")
        print(f"rank {distributed.get_rank()} of {distributed.get_world_size()}: {total}", force=True)
        distributed.disable()
    return said.getvalue()


def print_report(port_attempt_timeout: float) -> None:
    print(report(port_attempt_timeout), end="")


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    yield
    distributed.disable()


def slurm_task(rank: int, world_size: int, job_id: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": job_id,
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(world_size),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def test_one_process_gets_a_group_without_port_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_DEVICE", "cpu")
    before = dict(os.environ)
    distributed.enable()
    assert distributed.is_enabled() and distributed.get_world_size() == 1
    assert dict(os.environ) == before
    assert distributed.all_reduce(torch.tensor(2.0), "mean") == 2
    assert distributed.all_gather_with_grad(torch.ones(2, 3)).shape == (2, 3)
    with pytest.raises(RuntimeError, match="already exists"):
        distributed.enable()
    distributed.disable()
    assert not distributed.is_enabled()
    distributed.disable()


def test_group_of_somebody_else_is_used_and_its_end_noticed() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    distributed.new_subgroups([[0]])
    assert distributed.get_process_subgroup() is not distributed.get_default_process_group()
    dist.destroy_process_group()
    assert distributed.get_process_subgroup() is None and distributed.get_subgroup_size() == 1
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert distributed.get_process_subgroup() is distributed.get_default_process_group()


def test_print_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_DEVICE", "cpu")
    original = builtins.print
    distributed.enable()
    assert builtins.print is not original
    distributed.disable()
    assert builtins.print is original


@pytest.mark.distributed
def test_torchrun_starts_two_ranks() -> None:
    # What torchrun does with a script, its agent does with a function: store, environment variables, processes.
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="forkserver",
    )
    said = elastic_launch(config, report)()
    assert said == {0: "hidden unless main\nrank 0 of 2: 3.0\n", 1: "rank 1 of 2: 3.0\n"}


@pytest.mark.distributed
def test_ranks_move_on_together_when_their_port_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job_id = str(os.getpid() + 10**6)
    for name, value in slurm_task(0, 2, job_id).items():
        monkeypatch.setenv(name, value)
    port = TorchDistributedEnvironment().master_port
    with socket.socket() as squatter:  # accepts connections and never answers
        squatter.bind(("0.0.0.0", port))
        squatter.listen()
        ranks = [
            start(print_report, 0.2, output=tmp_path / str(rank), variables=slurm_task(rank, 2, job_id))
            for rank in range(2)
        ]
        for rank in ranks:
            rank.join(60)
    outputs = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert [rank.exitcode for rank in ranks] == [0, 0], outputs
    assert outputs[0].splitlines()[-1] == "rank 0 of 2: 3.0" and "rank 1 of 2: 3.0" in outputs[1]


def test_ranks_that_do_not_arrive_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm_task(0, 3, str(os.getpid() + 2 * 10**6)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed_setup, "ARRIVAL_TIMEOUT", timedelta(seconds=1))
    monkeypatch.setattr(TorchDistributedEnvironment, "export", lambda self, **_: self)
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] of 3 did not arrive"):
        distributed.enable()
