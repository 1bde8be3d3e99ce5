"""One run per output directory."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import IO

from dinov3.distributed import broadcast_object, is_subgroup_main_process

logger = logging.getLogger("dinov3")

LOCK_FILE = ".lock"
JOB_VARIABLES = ("SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID", "TORCHELASTIC_RUN_ID")

_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """A context manager that refuses a second run in the same directory, on this or another machine.

    The main process holds an exclusive `flock` on `<output_dir>/.lock`, in which stands who it is. A killed process
    holds nothing, so what it leaves is taken over. On file systems without `flock` there is a warning and no lock.

    Args:
        output_dir: is made if it does not exist.

    Raises:
        RuntimeError: on entering, on all ranks: another run holds the lock (the message says which), or the directory
            cannot be written to.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.path = Path(output_dir) / LOCK_FILE
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        problem = broadcast_object(self._acquire() if is_subgroup_main_process() else None)
        if problem is not None:
            raise RuntimeError(problem)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._close()

    def _acquire(self) -> str | None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+")
        except OSError as error:
            return f"{self.path.parent} cannot be written to ({error}): choose another --output-dir"
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _describe_holder(self.path)
            file.close()
            return f"{self.path.parent} is in use by another run ({holder}): end it or choose another --output-dir"
        except OSError as error:
            file.close()
            logger.warning("%s cannot be locked (%s): do not start a second run there", self.path.parent, error)
            return None
        file.truncate(0)
        file.write(json.dumps(_who_am_i()) + "\n")
        file.flush()
        self._file = file
        _held.add(self)
        return None

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _who_am_i() -> dict[str, str | int]:
    job = next((f"{name}={os.environ[name]}" for name in JOB_VARIABLES if name in os.environ), "none")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": job,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _describe_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}, job {holder['job']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which did not say who it is"


def _close_inherited_locks() -> None:
    # A loader worker shares the lock with its parent: it would keep the directory locked after the parent was killed.
    for lock in list(_held):
        lock._close()


os.register_at_fork(after_in_child=_close_inherited_locks)
