"""The context of a job: everything that a command sets up before its work and undoes after it."""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov3 import distributed
from dinov3.configs import exit_job, setup_job


@contextmanager
def job_context(
    output_dir: str | os.PathLike[str] | None = None,
    distributed_enabled: bool = True,
    logging_enabled: bool = True,
    seed: int | None = 0,
    restrict_print_to_main_process: bool = True,
    distributed_timeout: datetime.timedelta | None = None,
) -> Iterator[None]:
    """Run the body between `setup_job` and `exit_job`; see there for the arguments.

    An exception in the body leaves its traceback in `<output_dir>/logs/error.rank<r>.txt`, which distinguishes the
    process that failed from those that only lost their partner.

    Raises:
        RuntimeError: the output directory cannot be written to, or the process group cannot be started.
    """
    try:
        setup_job(
            output_dir=output_dir,
            distributed_enabled=distributed_enabled,
            logging_enabled=logging_enabled,
            seed=seed,
            restrict_print_to_main_process=restrict_print_to_main_process,
            distributed_timeout=distributed_timeout,
        )
        try:
            yield
        except Exception:
            if output_dir is not None:
                _write_traceback(Path(output_dir) / "logs" / f"error.rank{distributed.get_rank()}.txt")
            raise
    finally:
        exit_job(distributed_enabled=distributed_enabled, logging_enabled=logging_enabled)


def _write_traceback(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        # A full or lost disk must not hide the error itself.
        return
