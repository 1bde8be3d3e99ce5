"""Environment variables of jobs: hidden from jobs that a job launches, and where compiled kernels are kept."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What Slurm and submitit tell a job about itself. SBATCH_* are not among them: users set those as defaults of sbatch.
JOB_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI_", "PMIX_", "TORCHELASTIC_")
# Settings of the user or of the site that only look the same.
KEPT = ("SLURM_CONF", "SLURM_JWT", "SUBMITIT_PREEMPT_SIGNAL")
LAUNCHER_VARIABLES = ("SLURM_STEP_ID", "SUBMITIT_EXECUTOR", "TORCHELASTIC_RUN_ID")
RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
CACHE_VARIABLES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@contextmanager
def clean_env() -> Iterator[None]:
    """Hide what belongs to the present job alone, so that a job launched in the body does not take it for its own.

    Slurm's, submitit's and torchrun's variables go, as do rank, address and compile caches inside a job. Outside of a
    job these last are the user's own settings and stay. Afterwards the environment is as it was.
    """
    before = dict(os.environ)
    in_a_job = any(name in before for name in LAUNCHER_VARIABLES)
    for name in before:
        of_this_job = name.startswith(JOB_PREFIXES) and name not in KEPT
        if of_this_job or (in_a_job and name in RANK_VARIABLES + CACHE_VARIABLES):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def set_triton_cache_dir(dir: str | os.PathLike[str] | None = None) -> str:
    """Tell Triton where to keep compiled kernels, and make that directory.

    Args:
        dir: the directory. None keeps what `TRITON_CACHE_DIR` says already; without it, one of the user's own on the
            local disk, because home directories on a network file system are slow and shared by all nodes.

    Returns:
        The directory.
    """
    chosen = os.fspath(dir) if dir is not None else os.environ.get("TRITON_CACHE_DIR") or _local_cache_dir()
    Path(chosen).mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = chosen
    return chosen


def _local_cache_dir() -> str:
    return str(Path(tempfile.gettempdir()) / f"triton-{os.getuid()}")
