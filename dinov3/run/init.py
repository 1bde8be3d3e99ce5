"""The context of a job: everything that a command sets up before its work and undoes after it."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

from dinov3 import distributed
from dinov3.configs import exit_job, setup_job
from dinov3.utils.files import explaining_full_disk


@contextlib.contextmanager
def job_context(output_dir: str | os.PathLike[str] | None = None, seed: int | None = 0) -> Iterator[None]:
    """Run the body between `setup_job` and `exit_job`; see there for the arguments.

    An exception in the body leaves its traceback in `<output_dir>/logs/error.rank<r>.txt`, which distinguishes the
    process that failed from those that only lost their partner.

    Raises:
        DiskFullError: the body has filled the disk of the output directory.
        RuntimeError: the output directory cannot be written to, or the process group cannot be started.
    """
    try:
        setup_job(output_dir=output_dir, seed=seed)
        try:
            with contextlib.nullcontext() if output_dir is None else explaining_full_disk(Path(output_dir) / "logs"):
                yield
        except Exception:
            if output_dir is not None:
                path = Path(output_dir) / "logs" / f"error.rank{distributed.get_rank()}.txt"
                with contextlib.suppress(OSError):  # a full or lost disk must not hide the error itself
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
            raise
    finally:
        exit_job()
