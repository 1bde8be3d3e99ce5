"""Environment variables of jobs: hiding them from jobs that a job launches, and where compiled kernels are kept."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What Slurm and submitit set for a job. SBATCH_* are not among them: users set those as defaults of sbatch.
JOB_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI_", "PMIX_", "TORCHELASTIC_")
# Settings of the user or of the site that only look like them.
USER_VARIABLES = ("SLURM_CONF", "SLURM_JWT", "SUBMITIT_PREEMPT_SIGNAL")
LAUNCHER_VARIABLES = ("SLURM_STEP_ID", "SUBMITIT_EXECUTOR", "TORCHELASTIC_RUN_ID")
RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
CACHE_VARIABLES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@contextmanager
def clean_env() -> Iterator[None]:
    """Hide the variables that belong to the current job, so that a job launched in the body does not take them over.

    These are the variables of Slurm, submitit and torchrun, and inside a job those of rank, address and compile caches,
    which outside of a job are the user's own settings. Afterwards the environment is as it was.
    """
    before = dict(os.environ)
    in_a_job = any(name in before for name in LAUNCHER_VARIABLES)
    for name in before:
        of_this_job = name.startswith(JOB_PREFIXES) and name not in USER_VARIABLES
        if of_this_job or (in_a_job and name in RANK_VARIABLES + CACHE_VARIABLES):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def set_triton_cache_dir() -> None:
    """Keep Triton's compiled kernels where `TRITON_CACHE_DIR` says, by default in a directory on the local disk."""
    # Triton's own default is the home directory, which on clusters is a slow file system that all nodes share.
    # One per user, as Windows has anyway.
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    default = Path(tempfile.gettempdir()) / f"triton{user}"
    chosen = os.environ.setdefault("TRITON_CACHE_DIR", str(default))
    Path(chosen).mkdir(parents=True, exist_ok=True)
