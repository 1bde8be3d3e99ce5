"""`--profiling`: where the time of a few training steps goes, recorded with `torch.profiler`."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType

import torch

from dinov3 import distributed
from dinov3.distributed import runtime

logger = logging.getLogger("dinov3")

DIRECTORY = "profile"
#: The first steps compile, allocate and fill caches.
N_SKIPPED, N_WARM_UP, N_RECORDED = 3, 1, 3
N_ROWS = 40


class StepProfiler:
    """A context manager that records the fifth to seventh step of this process, then does nothing more.

    Each rank writes `trace.rank<r>.json`, for chrome://tracing or Perfetto, and `operators.rank<r>.txt`, the costliest
    operators.

    Args:
        output_dir: the run's directory; files go into `profile` below it.
    """

    def __init__(self, output_dir: Path) -> None:
        self.directory = output_dir / DIRECTORY
        self._profile: torch.profiler.profile | None = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=N_SKIPPED, warmup=N_WARM_UP, active=N_RECORDED, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._n_steps = 0

    def __enter__(self) -> StepProfiler:
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def step(self) -> None:
        """Note the end of a training step."""
        if self._profile is None:
            return
        self._profile.step()
        self._n_steps += 1
        if self._n_steps == N_SKIPPED + N_WARM_UP + N_RECORDED:
            self.close()

    def close(self) -> None:
        """Stop recording; a run that was too short leaves no files, or those of fewer steps."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, profile: torch.profiler.profile) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        rank = distributed.get_rank()
        profile.export_chrome_trace(str(self.directory / f"trace.rank{rank}.json"))
        key = "self_cpu_time_total" if runtime.device().type == "cpu" else "self_device_time_total"
        table = profile.key_averages().table(sort_by=key, row_limit=N_ROWS)
        (self.directory / f"operators.rank{rank}.txt").write_text(table)
        logger.info("profile of %d steps: %s", N_RECORDED, self.directory)
