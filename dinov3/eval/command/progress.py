"""Progress of long work: a bar with the time left on a terminal, otherwise a line in the log every half minute.

Notable: the main process shows its own share of the work, the others show nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from typing import Any, TypeVar

from tqdm import tqdm

from dinov3 import distributed

logger = logging.getLogger("dinov3")

Item = TypeVar("Item")

LOG_PERIOD = 30.0  # seconds
DEFAULT_SIZE = {"ncols": 100, "nrows": 20}


class Progress:
    """A context manager that shows a growing count.

    Args:
        description: what is being done.
        total: count at the end; None if unknown.
        unit: what is counted.
        initial: count at the beginning.
    """

    def __init__(self, description: str, total: int | None, *, unit: str = "batch", initial: int = 0) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.initial = self.done = initial
        self._note = ""
        self._started = self._logged = time.monotonic()
        self._bar = tqdm(
            desc=description,
            total=total,
            unit=unit,
            initial=initial,
            disable=None if distributed.is_main_process() else True,  # None: shown only on terminals
            **_fallback_size(),
            miniters=0,  # show a new note even if the count has not changed
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Add to the count.

        Args:
            count: 0 only shows a new note.
            note: shown behind the count from now on. Default: as before.
        """
        self.done += count
        if note is not None:
            self._note = note
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        if self._bar.disable and distributed.is_main_process() and time.monotonic() - self._logged >= LOG_PERIOD:
            self._logged = time.monotonic()
            logger.info("%s", str(self))  # formatted now, because the count moves on

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        parts = [f"{self.description}: {self.unit} {self.done}{of}", self._note]
        if self.total is not None and self.done != self.initial:
            seconds = (time.monotonic() - self._started) * (self.total - self.done) / (self.done - self.initial)
            parts.append(f"about {timedelta(seconds=round(seconds))} left")
        return ", ".join(part for part in parts if part)


def track(items: Iterable[Item], description: str, *, unit: str = "batch") -> Iterator[Item]:
    """Yield the items, counting those that have been worked on.

    Args:
        items: any number.
        description, unit: see `Progress`.
    """
    with Progress(description, len(items) if isinstance(items, Sized) else None, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance()


def _fallback_size() -> dict[str, int]:
    # Some terminals in containers claim to have no size, so tqdm would show nothing.
    try:
        is_known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        is_known = True
    return {} if is_known else DEFAULT_SIZE
