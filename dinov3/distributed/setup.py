"""Starting and ending the process group.

Notable: one process gets a group without network, port or environment variables. With several, an error names the ranks
that did not arrive, and if another program listens on the port, all ranks move on to the next candidate.
"""

from __future__ import annotations

import builtins
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dinov3.distributed import collectives, groups, runtime
from dinov3.distributed.environment import TorchDistributedEnvironment

# The stores are public, but the type hints of torch.distributed do not export them.
stores: Any = dist

ARRIVAL_TIMEOUT = timedelta(minutes=2)
# Long enough for a busy rank 0 to answer, short enough to try each candidate port several times in ARRIVAL_TIMEOUT.
PORT_ATTEMPT_TIMEOUT = timedelta(seconds=5)
JOB_KEY = "job"

_original_print: Callable[..., None] | None = None


def enable(
    *,
    overwrite: bool = False,
    nccl_async_error_handling: bool = False,
    restrict_print_to_main_process: bool = True,
    timeout: timedelta | None = None,
) -> None:
    """Start the default process group of this process's launcher (see `TorchDistributedEnvironment`).

    Args:
        overwrite: replace conflicting environment variables instead of raising.
        nccl_async_error_handling: set `TORCH_NCCL_ASYNC_ERROR_HANDLING=1`.
        restrict_print_to_main_process: `print` on other ranks than 0 prints only with `force=True`, or to other files
            than standard output.
        timeout: of collectives; by default torch's (10 minutes for NCCL, 30 for gloo).

    Raises:
        RuntimeError: a process group already exists, environment variables conflict, or ranks did not arrive in time.
    """
    if groups.is_enabled():
        raise RuntimeError("a process group already exists: call dinov3.distributed.disable() first")
    environment = TorchDistributedEnvironment()
    if environment.world_size > 1:
        environment.export(overwrite=overwrite, nccl_async_error_handling=nccl_async_error_handling)
    device = runtime.device()
    arguments: dict[str, Any] = {"rank": environment.rank, "world_size": environment.world_size}
    if device.type == "cuda":
        arguments["device_id"] = runtime.set_device(device)
    if timeout is not None:
        arguments["timeout"] = timeout
    dist.init_process_group(runtime.backend(device), store=_meeting_point(environment), **arguments)
    collectives.barrier()
    if restrict_print_to_main_process:
        _restrict_print(environment.is_main_process)


def disable() -> None:
    """End the default process group, if there is one, and restore `print`."""
    global _original_print
    if _original_print is not None:
        builtins.print = _original_print
        _original_print = None
    if groups.is_enabled():
        dist.destroy_process_group()


def _meeting_point(environment: TorchDistributedEnvironment) -> Any:
    if environment.world_size == 1:
        return stores.HashStore()
    if environment.job_type == "TorchElastic":
        # Under torchrun the agent already serves a store at this address.
        store, _, _ = next(rendezvous("env://", timeout=ARRIVAL_TIMEOUT))
    else:
        store = _store_on_first_free_port(environment)
    _wait_for_all_ranks(store, environment.rank, environment.world_size)
    return store


def _store_on_first_free_port(environment: TorchDistributedEnvironment) -> Any:
    # Rank 0 takes the first port that it can listen on; the others cannot know which, and try them in turn.
    deadline = time.monotonic() + ARRIVAL_TIMEOUT.total_seconds()
    open_store = _serve_store if environment.is_main_process else _join_store
    reasons: dict[int, str] = {}
    while True:
        for port in environment.candidate_ports:
            try:
                store = open_store(environment, port)
                os.environ["MASTER_PORT"] = str(port)
                return store
            except RuntimeError as error:
                reasons[port] = str(error).splitlines()[0]
        if environment.is_main_process or time.monotonic() > deadline:
            tried = "; ".join(f"port {port}: {reason}" for port, reason in reasons.items())
            raise RuntimeError(
                f"rank {environment.rank} could not meet the other ranks at {environment.master_addr} ({tried}): "
                "set MASTER_PORT to a free port of that host on all ranks"
            )


def _serve_store(environment: TorchDistributedEnvironment, port: int) -> Any:
    store = stores.TCPStore(environment.master_addr, port, is_master=True, wait_for_workers=False)
    store.set(JOB_KEY, environment.job_id)
    return store


def _join_store(environment: TorchDistributedEnvironment, port: int) -> Any:
    found: Future[Any] = Future()

    def connect() -> None:
        try:
            store = stores.TCPStore(
                environment.master_addr, port, is_master=False, wait_for_workers=False, timeout=PORT_ATTEMPT_TIMEOUT
            )
            found.set_result((store, store.get(JOB_KEY).decode()))
        except Exception as error:
            found.set_exception(error)

    # In a thread, because the constructor never returns if another program accepts the connection and stays silent.
    threading.Thread(target=connect, daemon=True).start()
    try:
        store, job_id = found.result(timeout=2 * PORT_ATTEMPT_TIMEOUT.total_seconds())
    except TimeoutError:
        raise RuntimeError("the program that listens there does not answer") from None
    if job_id != environment.job_id:
        raise RuntimeError(f"it is used by job {job_id}, not by job {environment.job_id}")
    return store


def _wait_for_all_ranks(store: Any, rank: int, world_size: int) -> None:
    store.set(f"arrived/{rank}", "yes")
    keys = {other: f"arrived/{other}" for other in range(world_size)}
    try:
        store.wait(list(keys.values()), ARRIVAL_TIMEOUT)
    except RuntimeError as error:
        missing = [other for other, key in keys.items() if not store.check([key])]
        raise RuntimeError(
            f"ranks {missing} of {world_size} did not arrive within {ARRIVAL_TIMEOUT.total_seconds():.0f} s: "
            "look for their errors in their own logs"
        ) from error


def _restrict_print(is_main_process: bool) -> None:
    global _original_print
    original = _original_print = builtins.print

    def print_in_main_process(*args: Any, force: bool = False, **kwargs: Any) -> None:
        # All ranks may print to other files: that is how logging prints tracebacks.
        if is_main_process or force or kwargs.get("file") not in (None, sys.stdout):
            original(*args, **kwargs)

    builtins.print = print_in_main_process
