"""Run a function in several gloo processes and collect what each rank returns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank: int, world_size: int, function: Callable[..., Any], args: tuple[Any, ...], directory: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    try:
        torch.save(function(rank, world_size, *args), f"{directory}/result{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call the module-level ``function(rank, world_size, *args)`` in ``world_size`` spawned gloo processes.

    Returns each rank's return value, in rank order; an exception in a rank is raised here.
    """
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_worker, args=(world_size, function, args, directory), nprocs=world_size, join=True)
        return [torch.load(Path(directory) / f"result{r}.pt", weights_only=False) for r in range(world_size)]
