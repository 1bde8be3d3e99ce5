"""Starting the launcher in tests, by its path, and waiting for what its jobs do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
TRAIN = REPOSITORY / "dinov3" / "train" / "train.py"


def submit(
    *arguments: object, variables: Mapping[str, str] | None = None, cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """The ended launcher, with its output as text; the user's own settings do not reach it."""
    launcher = start_submit(*arguments, variables=variables, cwd=cwd)
    try:
        out, err = launcher.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        launcher.kill()
        raise
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, out, err)


def start_submit(
    *arguments: object,
    variables: Mapping[str, str] | None = None,
    cwd: Path = REPOSITORY,
    output: Any = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """The running launcher."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
    environment |= {"OMP_NUM_THREADS": "1", "DINOV3_DEVICE": "cpu", "XDG_CONFIG_HOME": "/nonexistent"}
    environment.pop("PYTHONPATH", None)  # the launcher must find the package by itself
    return subprocess.Popen(
        [sys.executable, REPOSITORY / "dinov3" / "run" / "submit.py", *map(str, arguments)],
        cwd=cwd,
        env=environment | dict(variables or {}),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        text=True,
    )


def wait_until(condition: Callable[[], Any], seconds: float, explain: Callable[[], str] = str) -> None:
    """Return when `condition()` holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {explain()}"
        time.sleep(0.1)
