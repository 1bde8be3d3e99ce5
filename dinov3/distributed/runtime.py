"""The device of this process, and the few calls that differ between devices.

No other module names a device type or a communication backend. The device is, in this order: what `set_device` was
given, the environment variable `DINOV3_DEVICE`, and `auto`: the CUDA device of the local rank if there is one, and the
CPU otherwise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dinov3.utils.posix import resource

DEVICE_VARIABLE = "DINOV3_DEVICE"

_chosen_device: torch.device | None = None
#: The value that `preferring` gave the variable, so that errors do not name a variable that the user has not set.
_preferred_name: str | None = None


def device() -> torch.device:
    """Return the device of this process, with an index where the device type has several.

    Raises:
        ValueError: `DINOV3_DEVICE` is not a device, or not one of this machine.
    """
    if _chosen_device is not None:
        return _chosen_device
    name = os.environ.get(DEVICE_VARIABLE, "auto")
    try:
        return _resolve(name)
    except ValueError as error:
        if name == _preferred_name:
            raise
        raise ValueError(f"{DEVICE_VARIABLE}={name}: {error}") from error


def set_device(name: str | torch.device | None = None) -> torch.device:
    """Fix the device of this process.

    Args:
        name: a torch device, `"auto"`, or None to forget an earlier choice. Without an index, CUDA takes the local
            rank's device.

    Returns:
        The device now in use; a CUDA device is also made the current one.

    Raises:
        ValueError: this machine has no such device.
    """
    global _chosen_device
    _chosen_device = None if name is None or str(name) == "auto" else _resolve(str(name))
    current = device()
    if current.type == "cuda":
        torch.cuda.set_device(current)
    return current


@contextmanager
def preferring(name: str | None) -> Iterator[None]:
    """Set `DINOV3_DEVICE` to `name` inside the context, also for processes that are started there.

    Args:
        name: a torch device or `"auto"`; None leaves the variable as it is.
    """
    global _preferred_name
    before, preferred_before = os.environ.get(DEVICE_VARIABLE), _preferred_name
    if name is not None:
        os.environ[DEVICE_VARIABLE] = _preferred_name = name
    try:
        yield
    finally:
        _preferred_name = preferred_before
        if before is not None:
            os.environ[DEVICE_VARIABLE] = before
        elif name is not None:
            os.environ.pop(DEVICE_VARIABLE, None)


def synchronize() -> None:
    """Wait until the device has finished all work; does nothing on the CPU."""
    if device().type != "cpu":
        torch.accelerator.synchronize(device())


def max_memory_mib() -> float:
    """Return the peak memory of this process in MiB: allocated memory on a CUDA device, otherwise resident memory.

    Without a CUDA device it is 0 on Windows, which does not say.
    """
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated(device()) / 2**20
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def backend(for_device: torch.device | None = None) -> str:
    """Return the `init_process_group` backend for tensors on `for_device` (default: this process's) and on the CPU."""
    return "cpu:gloo,cuda:nccl" if (for_device or device()).type == "cuda" else "gloo"


def get_rng_state() -> Tensor | None:
    """Return the state of the device's random generator (uint8); None on the CPU (see `torch.get_rng_state`)."""
    if device().type == "cpu":
        return None
    return torch.get_device_module(device()).get_rng_state()


def set_rng_state(state: Tensor) -> None:
    """Restore what `get_rng_state` returned; does nothing on the CPU."""
    if device().type != "cpu":
        torch.get_device_module(device()).set_rng_state(state)


def _resolve(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is not a device; use auto, cpu, cuda or cuda:<index>") from error
    if chosen.type == "cuda":
        return _resolve_cuda(chosen)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {name!r} was requested, but this machine has no MPS device; use auto or cpu")
    return chosen


def _resolve_cuda(chosen: torch.device) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ValueError(f"device {str(chosen)!r} was requested, but torch sees no CUDA device; use auto or cpu")
    if chosen.index is None:
        local_rank = os.environ.get("LOCAL_RANK")
        # Slurm may give each task one visible device, which then has index 0 for every local rank.
        index = torch.cuda.current_device() if local_rank is None else int(local_rank) % count
        return torch.device("cuda", index)
    if chosen.index >= count:
        raise ValueError(f"device {str(chosen)!r} was requested, but torch sees only {count} CUDA devices")
    return chosen
