"""Run a function in several gloo processes and collect what each rank returns.

Ranks are forked from one server per test session that has imported what is slow to import, and nothing else: a rank is
there in a fraction of a second instead of ten, and shares no state with the test or with other ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SLOW_TO_IMPORT = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "torchvision", "dinov3.train.train"]


def _worker(
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    directory: str,
    environment: dict[str, str],
) -> None:
    # The server has the environment of its own start, not what the test has set since.
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    try:
        torch.save(function(rank, world_size, *args), f"{directory}/result{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call the module-level ``function(rank, world_size, *args)`` in ``world_size`` gloo processes.

    Returns each rank's return value, in rank order; an exception in a rank is raised here.
    """
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.get_context("forkserver").set_forkserver_preload(SLOW_TO_IMPORT)
        arguments = (world_size, function, args, directory, dict(os.environ))
        mp.start_processes(_worker, args=arguments, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(directory) / f"result{r}.pt", weights_only=False) for r in range(world_size)]
