"""What a run records about its surroundings, and its random seeds."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import numpy as np
import torch

GIT_TIMEOUT_S = 60


def fix_random_seeds(seed: int = 31) -> None:
    """Seed PyTorch (CPU and accelerators), NumPy's global generator and `random`."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def get_sha() -> str:
    """Describe the git state of the checkout that holds this package on one line; never raises.

    Returns:
        `"sha: <commit>, status: clean|has uncommited changes, branch: <name>"`, with `N/A` outside of a checkout.
    """
    here = Path(__file__).resolve().parent
    sha = run_git(here, "rev-parse", "HEAD").strip()
    if not sha:
        return "sha: N/A, status: clean, branch: N/A"
    status = "has uncommited changes" if run_git(here, "status", "--porcelain", "--untracked-files=no") else "clean"
    return f"sha: {sha}, status: {status}, branch: {run_git(here, 'rev-parse', '--abbrev-ref', 'HEAD').strip()}"


def run_git(directory: Path, *arguments: str) -> str:
    """Return what a git command prints in a directory; nothing if it fails, as outside of a checkout or without git."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, check=True, capture_output=True, timeout=GIT_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace")


def get_conda_env() -> tuple[str | None, str | None]:
    """Return the name and the directory of the active conda environment, None without one."""
    return os.environ.get("CONDA_DEFAULT_ENV"), os.environ.get("CONDA_PREFIX")
