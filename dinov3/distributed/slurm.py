"""What a Slurm task knows about its job: node names, task counts and whether the process is a task at all."""

from __future__ import annotations

import os
import re
import shutil
import subprocess


def is_slurm_task() -> bool:
    """Return whether this process was started as a task of a job step, that is by `srun`.

    A shell inside an allocation has the job's variables but not the step's: it is one process, not one of many.
    """
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" in os.environ


def task_count() -> int:
    """Return the number of tasks of this job step.

    Raises:
        RuntimeError: no variable says so.
    """
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        if name in os.environ:
            return int(os.environ[name])
    if "SLURM_TASKS_PER_NODE" in os.environ:
        # "2(x3),1": three nodes with two tasks and one node with one.
        parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ["SLURM_TASKS_PER_NODE"])
        return sum(int(tasks) * int(nodes or 1) for tasks, nodes in parts)
    raise RuntimeError(
        "this is a Slurm task, but SLURM_NTASKS, SLURM_STEP_NUM_TASKS and SLURM_TASKS_PER_NODE are all missing, so the "
        "number of tasks is unknown: give srun the option --ntasks"
    )


def hostnames(node_list: str) -> list[str]:
    """Expand a Slurm node list such as `node[01-02,5],login`, by `scontrol` where it is installed and configured."""
    if shutil.which("scontrol") is None:
        return expand_node_list(node_list)
    command = ["scontrol", "show", "hostnames", node_list]
    asked = subprocess.run(command, check=False, capture_output=True, text=True)
    return asked.stdout.split() if asked.returncode == 0 else expand_node_list(node_list)


def expand_node_list(node_list: str) -> list[str]:
    """Return the node names of a Slurm node list, in order.

    Args:
        node_list: comma-separated names with ranges in brackets, e.g. `rack[1-2]n[01-03,7],login`.
    """
    names: list[str] = []
    for pattern in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        expanded = [""]
        for text, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", pattern):
            choices = [text] if text else _expand_ranges(ranges)
            expanded = [prefix + choice for prefix in expanded for choice in choices]
        names += expanded
    return names


def _expand_ranges(ranges: str) -> list[str]:
    numbers: list[str] = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers
