"""Averaging the numbers of a training, and showing them: log, JSON lines, TensorBoard events, progress bar.

Notable: tensors stay on the device between two log lines; a line is one JSON object, with `null` for what is not
finite; no batch is fetched beyond the last iteration.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor
from tqdm import tqdm

from dinov3.distributed import is_main_process, is_subgroup_main_process, runtime
from dinov3.logging.smoothed_value import SmoothedValue, settle, synchronize
from dinov3.utils.files import atomic_write, explaining_full_disk

logger = logging.getLogger("dinov3")

T = TypeVar("T")

BAR_METERS = {
    "total_loss": "loss {:.4g}",
    "loss": "loss {:.4g}",
    "dino_local_crops_loss": "DINO local {:.3g}",
    "dino_global_crops_loss": "global {:.3g}",
    "ibot_loss": "iBOT {:.3g}",
    "koleo_loss": "KoLeo {:.2g}",
    "images_per_second": "{:.3g} images/s",
}


class MetricLogger:
    """Named series of numbers, logged every so many iterations.

    Args:
        delimiter: between the entries of a log line.
        output_file: JSON lines are appended here, by the main process of the subgroup.
        tensorboard_dir: directory of TensorBoard events with the same numbers at the same iterations.

    Attributes:
        meters: the series by name; also attributes of this object.
        latest: the newest JSON line.
    """

    def __init__(
        self,
        delimiter: str = "\t",
        output_file: str | os.PathLike[str] | None = None,
        tensorboard_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.delimiter = delimiter
        self.output_file = None if output_file is None else Path(output_file)
        self.tensorboard_dir = None if tensorboard_dir is None else Path(tensorboard_dir)
        self.meters: dict[str, SmoothedValue] = {}
        self.latest: dict[str, Any] = {}

    def update(self, **values: Any) -> None:
        """Append one value to each named series, making series that do not exist yet.

        Args:
            values: numbers, NumPy scalars, bools or tensors of one element; this does not wait for tensors.

        Raises:
            TypeError: a value is none of these.
        """
        for name, value in values.items():
            if isinstance(value, Tensor | np.ndarray):
                is_number = math.prod(value.shape) == 1
            else:
                is_number = isinstance(value, bool | int | float | np.number | np.bool_)
            if not is_number:
                raise TypeError(f"metric {name!r} must be a number or a tensor of one element, not {value!r}")
            self.meters.setdefault(name, SmoothedValue()).update(value)

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Use `meter` for the series `name`."""
        self.meters[name] = meter

    def __getattr__(self, name: str) -> SmoothedValue:
        meters = self.__dict__.get("meters", {})
        if name not in meters:
            raise AttributeError(f"{type(self).__name__} has no attribute and no meter {name!r}")
        return meters[name]

    def __str__(self) -> str:
        settle(self.meters.values())
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        """Make the global averages those over all ranks of the subgroup, which must have the same series."""
        synchronize(self.meters.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every series."""
        settle(self.meters.values())
        return {name: meter.state_dict() for name, meter in self.meters.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, meter_state in state.items():
            self.meters.setdefault(name, SmoothedValue()).load_state_dict(meter_state)

    def log_every(
        self,
        iterable: Iterable[T],
        print_freq: int,
        header: str | None = None,
        n_iterations: int | None = None,
        start_iteration: int = 0,
        *,
        progress: bool | Literal["auto"] = "auto",
    ) -> Iterator[T]:
        """Yield the items of `iterable`; log after iterations that are multiples of `print_freq` and after the last.

        Args:
            iterable: may be endless if `n_iterations` is given.
            print_freq: iterations between two lines.
            header: begins each line.
            n_iterations: number of the last iteration plus one; by default all of `iterable`, if it has a length.
            start_iteration: number of the first iteration.
            progress: show a progress bar in the main process, and log lines only in files; `"auto"`: if standard
                error is a terminal.

        Yields:
            `n_iterations - start_iteration` items.
        """
        if n_iterations is None and isinstance(iterable, Sized):
            n_iterations = start_iteration + len(iterable)
        if progress == "auto":
            progress = hasattr(sys.stderr, "isatty") and sys.stderr.isatty()
        log = _IterationLog(self, header or "", start_iteration, n_iterations, progress and is_main_process())
        iterator = iter(iterable)
        try:
            iteration = start_iteration
            while n_iterations is None or iteration < n_iterations:
                started = time.perf_counter()
                try:
                    item = next(iterator)
                except StopIteration:
                    break
                log.data_time.update(time.perf_counter() - started)
                yield item
                log.iter_time.update(time.perf_counter() - started)
                log.bar.update()
                if iteration % print_freq == 0 or iteration + 1 == n_iterations:
                    log.write(iteration)
                iteration += 1
        finally:
            log.close()


class _IterationLog:
    """Times and output of one pass of `MetricLogger.log_every`."""

    def __init__(
        self, metrics: MetricLogger, header: str, start_iteration: int, n_iterations: int | None, show_bar: bool
    ) -> None:
        self.metrics = metrics
        self.header = header
        self.n_iterations = n_iterations
        self.iter_time = SmoothedValue(fmt="{avg:.4f}")
        self.data_time = SmoothedValue(fmt="{avg:.4f}")
        self.tensorboard = _tensorboard_writer(metrics.tensorboard_dir, start_iteration)
        self.bar = tqdm(
            desc=header or None,
            total=n_iterations,
            initial=start_iteration,
            disable=not show_bar,
            dynamic_ncols=True,
        )

    def write(self, iteration: int) -> None:
        settle(self.metrics.meters.values())
        medians = {name: meter.median for name, meter in self.metrics.meters.items()}
        numbers = {"iter_time": self.iter_time.avg, "data_time": self.data_time.avg} | medians
        self.metrics.latest = {"iteration": iteration}
        self.metrics.latest |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        if nonfinite := [name for name, value in numbers.items() if not math.isfinite(value)]:
            self.metrics.latest["nonfinite"] = nonfinite
        if is_subgroup_main_process() and self.metrics.output_file is not None:
            self.metrics.output_file.parent.mkdir(parents=True, exist_ok=True)
            path = self.metrics.output_file
            with explaining_full_disk(path), path.open("a") as file:
                file.write(json.dumps(self.metrics.latest) + "\n")
        if self.tensorboard is not None:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, iteration)
            self.tensorboard.flush()
        logger.info(self._line(iteration), extra={"is_in_progress_bar": not self.bar.disable})
        if not self.bar.disable:
            shown = [text.format(medians[name]) for name, text in BAR_METERS.items() if name in medians]
            waiting = self.data_time.avg / max(self.iter_time.avg, 1e-9)
            self.bar.set_postfix_str(", ".join([*shown, f"waits for data {waiting:.0%}"]))

    def close(self) -> None:
        self.bar.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _line(self, iteration: int) -> str:
        entries = [self.header] if self.header else []
        if self.n_iterations is None:
            entries.append(f"[{iteration}]")
        else:
            remaining = timedelta(seconds=int(self.iter_time.global_avg * (self.n_iterations - iteration - 1)))
            width = len(str(self.n_iterations))
            entries += [f"[{iteration:{width}}/{self.n_iterations}]", f"eta: {remaining}"]
        entries += [str(self.metrics)] if self.metrics.meters else []
        entries += [f"time: {self.iter_time}", f"data: {self.data_time}", f"max mem: {runtime.max_memory_mib():.0f}"]
        return self.metrics.delimiter.join(entries)


def truncate_metrics_file(path: str | os.PathLike[str], first_dropped_iteration: int) -> None:
    """Drop the lines of a metrics file from an iteration on, and an incomplete last line; replaces the file atomically.

    Args:
        path: a file of JSON lines with the key `iteration`; nothing happens if it does not exist.
        first_dropped_iteration: lines with this or a later iteration are dropped.
    """
    path = Path(path)
    if not path.exists():
        return
    remaining = [line for line in path.read_text().splitlines() if _iteration_of(line) < first_dropped_iteration]
    with atomic_write(path, "w") as file:
        file.writelines(line + "\n" for line in remaining)


def _iteration_of(line: str) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _tensorboard_writer(directory: Path | None, start_iteration: int) -> Any:
    if directory is None or not is_subgroup_main_process():
        return None
    from torch.utils.tensorboard import SummaryWriter

    # `purge_step` hides what an earlier run in the same directory wrote from this iteration on.
    return SummaryWriter(str(directory), purge_step=start_iteration)
