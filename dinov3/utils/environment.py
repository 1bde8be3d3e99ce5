"""What a run records about its surroundings, and its random seeds."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import numpy as np
import torch


def fix_random_seeds(seed: int = 31) -> None:
    """Seed PyTorch (CPU and accelerators), NumPy's global generator and `random`."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def get_sha() -> str:
    """The git state of the checkout that holds this package, on one line; never raises.

    Returns:
        `"sha: <commit>, status: clean|has uncommited changes, branch: <name>"`, with `N/A` outside of a checkout.
    """
    try:
        sha = _git("rev-parse", "HEAD")
        status = "has uncommited changes" if _git("status", "--porcelain", "--untracked-files=no") else "clean"
        branch = _git("rev-parse", "--abbrev-ref", "HEAD")
    except (OSError, subprocess.SubprocessError):
        sha, status, branch = "N/A", "clean", "N/A"
    return f"sha: {sha}, status: {status}, branch: {branch}"


def get_conda_env() -> tuple[str | None, str | None]:
    """The name and the directory of the active conda environment, None where there is none."""
    return os.environ.get("CONDA_DEFAULT_ENV"), os.environ.get("CONDA_PREFIX")


def _git(*args: str) -> str:
    here = Path(__file__).resolve().parent
    return subprocess.run(
        ["git", *args], cwd=here, check=True, capture_output=True, text=True, timeout=20
    ).stdout.strip()
