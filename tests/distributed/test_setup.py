from __future__ import annotations

import builtins
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dinov3 import distributed
from dinov3.distributed import TorchDistributedEnvironment
from dinov3.distributed import setup as distributed_setup

REPOSITORY = Path(__file__).parents[2]
REPORT = """
    import torch
    from dinov3 import distributed
    distributed.enable()
    total = float(distributed.all_reduce(torch.tensor(distributed.get_rank() + 1.0)))
    print("hidden unless main")
    print(f"rank {distributed.get_rank()} of {distributed.get_world_size()}: {total}", force=True)
    distributed.disable()
"""


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    yield
    distributed.disable()


def start(code: str, **variables: str) -> subprocess.Popen[str]:
    environment = {name: v for name, v in os.environ.items() if not name.startswith(("SLURM", "SUBMITIT", "TORCHEL"))}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        env=environment | {"OMP_NUM_THREADS": "1", "DINOV3_DEVICE": "cpu"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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
    with pytest.raises(RuntimeError, match="exists already"):
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


def test_print_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_DEVICE", "cpu")
    original = builtins.print
    distributed.enable()
    assert builtins.print is not original
    distributed.disable()
    assert builtins.print is original


@pytest.mark.distributed
def test_torchrun_starts_two_ranks() -> None:
    code = textwrap.dedent(REPORT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # Unbuffered, a line and its end are two writes, between which the other rank may write its own.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [*command, "--no-python", sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=buffered | {"OMP_NUM_THREADS": "1", "DINOV3_DEVICE": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["hidden unless main", "rank 0 of 2: 3.0", "rank 1 of 2: 3.0"]


@pytest.mark.distributed
def test_ranks_move_on_together_when_their_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = str(os.getpid() + 10**6)
    for name, value in slurm_task(0, 2, job_id).items():
        monkeypatch.setenv(name, value)
    port = TorchDistributedEnvironment().master_port
    impatient = "from datetime import timedelta\nfrom dinov3.distributed import setup\n"
    impatient += "setup.PORT_ATTEMPT_TIMEOUT = timedelta(seconds=1)\n"
    with socket.socket() as squatter:  # accepts connections and never answers
        squatter.bind(("0.0.0.0", port))
        squatter.listen()
        ranks = [start(impatient + textwrap.dedent(REPORT), **slurm_task(r, 2, job_id)) for r in range(2)]
        outputs = [process.communicate(timeout=60) for process in ranks]
    assert all(process.returncode == 0 for process in ranks), outputs
    assert outputs[0][0].splitlines()[-1] == "rank 0 of 2: 3.0" and "rank 1 of 2: 3.0" in outputs[1][0]


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm_task(0, 3, str(os.getpid() + 2 * 10**6)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed_setup, "ARRIVAL_TIMEOUT", timedelta(seconds=1))
    monkeypatch.setattr(TorchDistributedEnvironment, "export", lambda self, **_: self)
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] of 3 did not come"):
        distributed.enable()
