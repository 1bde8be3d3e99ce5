"""Run functions in separate processes, singly or as ranks.

They are forked from one server per test session that has only imported what is slow to import: a process starts in a
fraction of a second instead of ten, and shares no state with the test or with other processes.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SLOW_TO_IMPORT = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "torchvision", "dinov3.train.train"]
TIMEOUT_SECONDS = 300


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call the module-level ``function(rank, world_size, *args)`` in ``world_size`` gloo processes.

    Returns each rank's return value, in rank order; an exception in a rank is raised here.
    """
    _prepare_server()
    with tempfile.TemporaryDirectory() as directory:
        arguments = (world_size, function, args, directory, dict(os.environ))
        mp.start_processes(_run_rank, args=arguments, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(directory) / f"result{r}.pt", weights_only=False) for r in range(world_size)]


def start(
    function: Callable[..., Any], *args: Any, output: Path, variables: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start the module-level ``function(*args)`` in a process, like a command: its output is appended to ``output``.

    Args:
        function: what to call; `SystemExit` gives the exit code.
        output: a file.
        variables: added to the environment.
    """
    server = _prepare_server()
    process = server.Process(target=_run, args=(function, args, output, dict(os.environ) | dict(variables or {})))
    process.start()
    return process


def launch(function: Callable[..., Any], world_size: int, *args: Any, output: Path) -> None:
    """Call the module-level ``function(*args)`` in processes; if they are several, with the environment of torchrun.

    Fails and shows ``output`` unless all of them succeed.
    """
    variables = torchrun_variables(world_size) if world_size > 1 else [{}]
    ranks = [start(function, *args, output=output, variables=of_rank) for of_rank in variables]
    for rank in ranks:
        rank.join(TIMEOUT_SECONDS)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [0] * world_size, f"exit codes {codes}:\n{output.read_text()[-5000:]}"


def torchrun_variables(world_size: int) -> list[dict[str, str]]:
    """What torchrun adds to the environment of each rank."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        common = {
            "TORCHELASTIC_RUN_ID": "x",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
        }
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size))
    return [common | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(world_size)]


def _prepare_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_TO_IMPORT)
    return context


def _enter(environment: dict[str, str]) -> None:
    # The server still has the environment that it started with, not what the test has set since.
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)


def _run(function: Callable[..., Any], args: tuple[Any, ...], output: Path, environment: dict[str, str]) -> None:
    _enter(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    function(*args)


def _run_rank(
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    directory: str,
    environment: dict[str, str],
) -> None:
    _enter(environment)
    store = dist.FileStore(f"{directory}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    try:
        torch.save(function(rank, world_size, *args), f"{directory}/result{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
