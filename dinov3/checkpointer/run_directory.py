"""What a run's directory holds: its checkpoints, which of them stay, what a crash left, and the lock of the run."""

from __future__ import annotations

import enum
import json
import logging
import os
import re
import shutil
import socket
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import IO

from dinov3.distributed import broadcast_object, is_subgroup_main_process
from dinov3.utils.files import publish_directory, temporary_beside
from dinov3.utils.posix import fcntl

logger = logging.getLogger("dinov3")

ITERATION = re.compile(r"0|[1-9][0-9]*")
TEMPORARY = re.compile(r"\.tmp-(?P<name>.+)-[0-9a-f]{8}(?P<is_old>\.old)?")
LOCK_FILE = ".lock"
JOB_VARIABLES = ("SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID", "TORCHELASTIC_RUN_ID")

_held_locks: weakref.WeakSet[RunLock] = weakref.WeakSet()


class CheckpointRetentionPolicy(enum.Enum):
    """Which of a training's checkpoints `cleanup_checkpoint` keeps."""

    ALL = "all"
    BEST = "best"
    LAST = "last"
    LAST_AND_BEST = "last_and_best"
    NONE = "none"

    @property
    def keep_filters(self) -> tuple[str, ...]:
        """Names of the checkpoints that stay; `ALL` keeps the numbered ones too."""
        best = ("best",) if self in (self.BEST, self.LAST_AND_BEST) else ()
        last = ("final",) if self in (self.LAST, self.LAST_AND_BEST) else ()
        return best + last

    @property
    def max_to_keep(self) -> int | None:
        """How many numbered checkpoints a training keeps while it runs; None for all."""
        return None if self is self.ALL else 1


def find_all_checkpoints(root: str | os.PathLike[str]) -> list[Path]:
    """List the directories in `root` that are named by an iteration (no signs, no leading zeros), in order.

    Args:
        root: a directory, which need not exist.
    """
    if not Path(root).is_dir():
        return []
    found = [path for path in Path(root).iterdir() if ITERATION.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def find_latest_checkpoint(root: str | os.PathLike[str]) -> Path | None:
    """Return the last of `find_all_checkpoints`, damaged or not; None without any."""
    return next(reversed(find_all_checkpoints(root)), None)


def keep_last_n_checkpoints(root: str | os.PathLike[str], n: int | None) -> None:
    """Delete all numbered checkpoints in `root` except the newest; call it in one process.

    Args:
        root: a directory, which need not exist.
        n: how many to keep; None keeps all.

    Raises:
        ValueError: negative `n`.
    """
    if n is None:
        return
    if n < 0:
        raise ValueError(f"cannot keep {n} checkpoints; give a number >= 0, or None to keep all")
    checkpoints = find_all_checkpoints(root)
    for directory in checkpoints[: max(len(checkpoints) - n, 0)]:
        _remove(directory)


def keep_checkpoint_copy(source: str | os.PathLike[str]) -> Path:
    """Make `<source>_keep`, which `keep_last_n_checkpoints` does not touch, from hard links; call it in one process.

    Args:
        source: a complete checkpoint. Where the file system has no hard links, its files are copied.

    Returns:
        The new directory; it replaces an older one.
    """

    def link_or_copy(file: str, name: str) -> None:
        try:
            os.link(file, name)
        except OSError:
            shutil.copy2(file, name)

    source = Path(source)
    target = source.with_name(f"{source.name}_keep")
    temporary = temporary_beside(target)
    shutil.copytree(source, temporary, copy_function=link_or_copy)
    publish_directory(temporary, target)
    return target


def cleanup_checkpoint(root: str | os.PathLike[str], policy: CheckpointRetentionPolicy) -> None:
    """Delete the checkpoints in `root` that `policy` does not keep; call it in one process.

    Checkpoints are the numbered directories, `best` and `final`; everything else in `root` stays.

    Args:
        root: a directory, which need not exist.
        policy: which checkpoints stay.
    """
    if policy is CheckpointRetentionPolicy.ALL:
        return
    named = [Path(root) / name for name in CheckpointRetentionPolicy.LAST_AND_BEST.keep_filters]
    for directory in [*find_all_checkpoints(root), *named]:
        if directory.name not in policy.keep_filters:
            _remove(directory)


def remove_stale_temporaries(root: str | os.PathLike[str]) -> None:
    """Clean up after crashes while checkpoints in `root` were saved, copied or deleted.

    Only the process that holds the run's lock may call it: it also deletes the temporary directory of a save in
    progress.

    Args:
        root: a directory of checkpoints; nothing happens if it does not exist.
    """
    if not Path(root).is_dir():
        return
    for entry in Path(root).iterdir():
        match = TEMPORARY.fullmatch(entry.name)
        if match is None:
            continue
        target = entry.with_name(match["name"])
        if match["is_old"] and not target.exists():
            # The crash came after the old directory had stepped aside and before the new one had its name.
            entry.rename(target)
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _remove(directory: Path) -> None:
    # Renamed first, so that a crash leaves no half of it under its name.
    doomed = temporary_beside(directory)
    try:
        directory.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed)


class RunLock:
    """A context manager that refuses a second run in the same directory, on this or another machine.

    The main process holds an exclusive `flock` on `<output_dir>/.lock` and writes into it who it is. The system
    releases the lock of a killed process. File systems without `flock` get a warning and no lock.

    Args:
        output_dir: created if it does not exist.

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
        if fcntl is None:
            logger.warning("%s cannot be locked on this system: do not start a second run there", self.path.parent)
            file.close()
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return (
                f"{self.path.parent} is in use by another run ({self._describe_holder()}): "
                "end it or choose another --output-dir"
            )
        except OSError as error:
            file.close()
            logger.warning("%s cannot be locked (%s): do not start a second run there", self.path.parent, error)
            return None
        file.truncate(0)
        job = next((f"{name}={os.environ[name]}" for name in JOB_VARIABLES if name in os.environ), "none")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": job}
        file.write(json.dumps(holder | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")
        file.flush()
        self._file = file
        _held_locks.add(self)
        return None

    def _describe_holder(self) -> str:
        try:
            holder = json.loads(self.path.read_text())
            return f"process {holder['pid']} on {holder['host']}, job {holder['job']}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "its lock file does not say which"

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _close_inherited_locks() -> None:
    # A loader worker shares the lock with its parent: it would keep the directory locked after the parent was killed.
    for lock in list(_held_locks):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited_locks)
