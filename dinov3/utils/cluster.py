"""Whether there is a Slurm cluster, and what a job asks of it."""

from __future__ import annotations

import subprocess
from typing import Any

PING_TIMEOUT_S = 15


def slurm_answers() -> bool:
    """Return whether there is a Slurm to submit to: `scontrol ping` reaches a controller."""
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=PING_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and " UP" in done.stdout


def get_slurm_executor_parameters(nodes: int, num_gpus_per_node: int, **overrides: Any) -> dict[str, Any]:
    """Return parameters of submitit's `AutoExecutor`: one task per GPU, all memory of the nodes.

    Args:
        nodes: number of nodes.
        num_gpus_per_node: GPUs and tasks per node; 0 means one task and no request for GPUs.
        **overrides: further or other parameters; None removes one, so that Slurm's default holds.
    """
    parameters = {
        "mem_gb": 0,  # how Slurm spells "all of it"
        "gpus_per_node": num_gpus_per_node or None,
        "tasks_per_node": max(num_gpus_per_node, 1),
        "nodes": nodes,
        **overrides,
    }
    return {name: value for name, value in parameters.items() if value is not None}
