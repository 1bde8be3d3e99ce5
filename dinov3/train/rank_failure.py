"""When one process of a training dies, the others end too, within a minute, and report why.

Notable: a dead process closes its connections. A thread of each rank listens to its neighbour's, over a process group
of its own, so that it notices even while the main thread waits for something that will never come (NCCL does, for ten
minutes). The error of the rank that failed is in `<output_dir>/logs/error.rank<r>.txt`, where the others find it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from dinov3 import distributed

logger = logging.getLogger("dinov3")

#: How long a rank may continue after its neighbour has gone: to raise, or to finish as the neighbour did.
GRACE_SECONDS = 30.0
#: On network file systems the error file of the rank that failed may become visible after its end.
FILE_DELAY_SECONDS = 3.0
LISTENING_TIMEOUT = timedelta(days=365)
EXIT_STATUS = 1
GOODBYE, ALARM = 0.0, 1.0

_LOST_CONNECTION = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "Socket Timeout",
)


class LostRankError(RuntimeError):
    """Another process of the training is gone."""


@contextmanager
def ending_together(output_dir: Path) -> Iterator[None]:
    """End this rank when another rank ends within the body; all ranks enter and leave the body together.

    Args:
        output_dir: where `job_context` leaves the tracebacks of failed ranks.

    Raises:
        LostRankError: another rank failed or was killed; the message says what is known.
    """
    logs = output_dir / "logs"
    if distributed.is_main_process():
        for path in logs.glob("error.rank*.txt"):
            path.unlink(missing_ok=True)
    if distributed.get_world_size() == 1:
        yield
        return
    neighbour = _Neighbour(logs)
    try:
        yield
    except Exception as error:
        neighbour.stop_listening()
        logger.exception("rank %d failed", distributed.get_rank())
        if isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST_CONNECTION):
            raise LostRankError(_explain(logs)) from error
        raise
    except BaseException:
        neighbour.stop_listening()
        raise
    neighbour.say_goodbye()


class _Neighbour:
    """The next rank in the ring, to whose connection a thread listens."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        group = dist.new_group(backend="gloo", timeout=LISTENING_TIMEOUT)
        assert isinstance(group, ProcessGroup)
        self.group = group
        rank, size = distributed.get_rank(), distributed.get_world_size()
        self.next_rank, self.previous_rank = (rank + 1) % size, (rank - 1) % size
        self.is_over = threading.Event()
        # A daemon: it must not keep a process alive.
        self.thread = threading.Thread(target=self._listen, daemon=True, name="rank-failure")
        self.thread.start()

    def _listen(self) -> None:
        message = torch.zeros(1)
        try:
            dist.recv(message, src=self.next_rank, group=self.group)
        except Exception:
            message.fill_(ALARM)
        if message.item() != ALARM:
            return
        with suppress(Exception):
            # Pass the alarm around the ring: each rank has connections only to its neighbours.
            dist.send(message, dst=self.previous_rank, group=self.group)
        # Usually the main thread notices as well, and ends with the better message.
        if not self.is_over.wait(GRACE_SECONDS):
            logger.error("a rank is gone. %s", _explain(self.logs))
            logging.shutdown()
            os._exit(EXIT_STATUS)

    def say_goodbye(self) -> None:
        """Wait until the neighbour has finished as well."""
        self.is_over.set()
        with suppress(RuntimeError):  # It may have failed after its last word to this rank.
            dist.send(torch.full((1,), GOODBYE), dst=self.previous_rank, group=self.group)
        self.thread.join()

    def stop_listening(self) -> None:
        """Let this rank end by itself from now on."""
        self.is_over.set()


def _explain(logs: Path) -> str:
    deadline = time.monotonic() + FILE_DELAY_SECONDS
    while not (failed := _errors_of_others(logs)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if not failed:
        return (
            "Another process of this training is gone without an error message: it was probably killed from outside, "
            f"for instance because the memory was full; see its log in {logs} and the system's"
        )
    path = failed[0]
    rank = path.stem.removeprefix("error.rank")
    return f"rank {rank} failed: {path.read_text(encoding='utf-8').strip().splitlines()[-1]} (traceback: {path})"


def _errors_of_others(logs: Path) -> list[Path]:
    # Files with an error that is not the loss of another rank, the earliest first.
    found = [path for path in logs.glob("error.rank*.txt") if LostRankError.__name__ not in path.read_text("utf-8")]
    return sorted(found, key=lambda path: path.stat().st_mtime)
