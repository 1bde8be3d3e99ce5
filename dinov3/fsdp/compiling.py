"""Compilation of a model's parts in place, where the machine can compile."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

logger = logging.getLogger("dinov3")


def wants_compilation(setting: bool | Literal["auto"], device: torch.device) -> bool:
    """Whether to compile: as set, with `"auto"` on CUDA only; never where compiling fails, with a warning.

    Args:
        setting: `train.compile`.
        device: where the model runs.

    Raises:
        ValueError: another setting.
    """
    if setting not in (True, False, "auto"):
        raise ValueError(f"train.compile={setting!r} is unknown; use auto, true or false")
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return False
    problem = _compilation_problem(device)
    if problem is not None:
        logger.warning("train.compile=%s, but compiling fails here: running without (%s)", setting, problem)
    return problem is None


def compile_in_place(modules: Iterable[nn.Module], *, cudagraphs: bool) -> None:
    """Compile each module; names in the state dict stay.

    Args:
        modules: parts that are called as a whole.
        cudagraphs: one graph for each input shape, replayed as a CUDA graph.
    """
    options: dict[str, Any] = {}
    if cudagraphs:
        options = {"fullgraph": True, "dynamic": False, "options": {"triton.cudagraphs": True}}
    for module in modules:
        module.compile(**options)


@functools.cache
def _compilation_problem(device: torch.device) -> str | None:
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
