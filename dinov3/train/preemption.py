"""Leaving a training in time when the cluster wants the machine back: finish the step, save, exit.

Notable: a signal only sets a flag. The flags of all processes travel with the step's all-reduce, so that all of them
stop after the same iteration. The previous handler of the signal (submitit's, which sends the job back to the queue) is
called when the checkpoint is on the disk; without such a handler the exit status says "saved, run me again".
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from dinov3 import distributed

logger = logging.getLogger("dinov3")

#: EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again.
EXIT_STATUS = 75
#: Those that this system has: Windows has no SIGUSR1 and SIGUSR2.
SIGNALS: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT") if hasattr(signal, name)
)
#: How long the other ranks wait for rank 0 to requeue the job: a task that exits first can make srun kill rank 0.
REQUEUE_TIMEOUT = timedelta(seconds=60)


class Preemption:
    """A context manager in which SIGTERM, SIGUSR1, SIGUSR2 and a first SIGINT only ask the training to stop.

    Outside the main thread, where Python handles no signals, it changes nothing.

    Attributes:
        received: the first signal that came, if any.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    @property
    def is_requested(self) -> bool:
        """Whether a signal came to this process."""
        return self.received is not None

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python, which cannot be restored from there.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def leave(self) -> NoReturn:
        """End this process, whose training was saved; all ranks call it.

        Rank 0 passes the signal on to its previous handler, which may requeue the job and then does not return.

        Raises:
            SystemExit: with status 75, unless the handler exits differently.
        """
        # In multi-distillation the groups of the students stop together.
        everybody = distributed.get_default_process_group()
        received = next((s for s in distributed.all_gather_objects(self.received, everybody) if s is not None), None)
        name = "a signal" if received is None else received.name
        handler = None if received is None else self._previous.get(received)
        if not callable(handler) or handler is signal.default_int_handler:
            logger.warning("%s: leaving with exit status %d; the same command continues from here", name, EXIT_STATUS)
            sys.exit(EXIT_STATUS)
        logger.warning("%s: rank 0 passes it on to the launcher, which may requeue this job", name)
        distributed.barrier(everybody)
        if distributed.is_main_process():
            handler(received, None)
        if distributed.get_world_size() > 1:
            # Until rank 0 comes here too, is gone, or the time is over.
            work = dist.all_reduce(torch.zeros(1), group=everybody, async_op=True)
            with suppress(RuntimeError):
                work.wait(timeout=REQUEUE_TIMEOUT)
        logger.warning("the launcher did not end this process: leaving with exit status %d", EXIT_STATUS)
        sys.exit(EXIT_STATUS)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # A forked loader worker: the training process decides.
            return
        if number == signal.SIGINT and self.received is signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number)
            hint = " (once more: at once, without saving)" if number == signal.SIGINT else ""
            # Not through the log, which the interrupted code may be writing to.
            os.write(2, f"\n{self.received.name}: stopping after this step, with a checkpoint{hint}\n".encode())
