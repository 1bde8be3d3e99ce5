"""Saving while training goes on: the state is copied, then written, checked and renamed by a thread.

Notable: the threads of all ranks talk to each other over a process group of their own, so that they disturb no
collective of the training. A checkpoint appears under its name in the same way, and as late, as a synchronous one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from dinov3.checkpointer.agreement import CheckpointError, on_all, on_main, start_saving_dcp
from dinov3.checkpointer.saving import (
    check_metadata,
    collect_state,
    digest_share,
    make_temporary,
    naming,
    publish,
    removed_on_error,
)
from dinov3.distributed import get_process_subgroup


class BackgroundSaver:
    """Writes one checkpoint at a time beside the training; all ranks make the same calls.

    Args:
        process_group: the processes that hold the model, by default the subgroup of this process.
    """

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        self._group = process_group or get_process_subgroup()
        self._group_of_threads: ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._problem: CheckpointError | None = None

    @property
    def is_running(self) -> bool:
        """Whether this rank still writes."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        ckpt_dir: str | os.PathLike[str],
        *,
        iteration: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        overwrite: bool = True,
        metadata: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """Begin what `save_checkpoint` does, once the save before is complete; see there for the arguments.

        What happens to the model afterwards does not change what is saved.

        Raises:
            CheckpointError: the save before failed, or this one cannot begin; on all ranks.
            ValueError: `metadata` is not JSON.
        """
        self.wait()
        check_metadata(metadata)
        target = Path(ckpt_dir)
        group = self._make_group()
        with naming(target):
            temporary = on_main(self._group, lambda: make_temporary(target, overwrite))
            with removed_on_error(temporary, self._group):
                state = collect_state(iteration, model, optimizer, others)
                contents = list(state)
                started: list[Future[Any]] = []
                on_all(self._group, lambda: started.append(start_saving_dcp(state, temporary, group)))

        def finish_writing() -> dict[str, dict[str, Any]]:
            started[0].result()
            return digest_share(temporary, group)

        def complete() -> None:
            with naming(target), removed_on_error(temporary, group):
                digests = on_all(group, finish_writing)
                publish(temporary, target, group, digests, iteration=iteration, contents=contents, metadata=metadata)

        self._thread = threading.Thread(target=self._run, args=(complete,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the save in progress is complete, if there is one.

        Raises:
            CheckpointError: it failed; said once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _run(self, complete: Callable[[], None]) -> None:
        try:
            complete()
        except CheckpointError as error:
            self._problem = error
        except Exception as error:  # A lost rank, above all.
            self._problem = CheckpointError(f"{type(error).__name__}: {error}")

    def _make_group(self) -> ProcessGroup | None:
        if self._group is not None and self._group_of_threads is None:
            ranks = dist.get_process_group_ranks(self._group)
            group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
            assert isinstance(group, ProcessGroup)
            self._group_of_threads = group
        return self._group_of_threads
