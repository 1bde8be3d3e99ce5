"""Sending log messages to standard output of the main process and to one file for each rank."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dinov3.distributed import TorchDistributedEnvironment, get_rank, is_enabled
from dinov3.utils.text import escape_what_cannot_be_printed

RESET = "\x1b[0m"
COLOURS = {logging.DEBUG: "\x1b[2m", logging.INFO: "\x1b[32m", logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m"}
PREFIX = "{levelname[0]}{asctime} {process} {name} {filename}:{lineno}]"
DATE_FORMAT = "%Y%m%d %H:%M:%S"

# The arguments and handlers of the current set-up, by logger name.
_current: dict[str | None, tuple[tuple[Any, ...], list[logging.Handler]]] = {}


def setup_logging(
    output: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    level: int = logging.DEBUG,
) -> None:
    """Send log messages and Python warnings to standard output (in rank 0) and to a file.

    Lines read `<level><YYYYmmdd HH:MM:SS> <process id> <logger> <file>:<line>] <message>`, with colours on a terminal
    unless `NO_COLOR` is set. A second call with equal arguments does nothing.

    Args:
        output: a directory, for the file `logs/log.txt` in it; or a file that ends in `.txt` or `.log`; None for no
            file. Ranks other than 0 append `.rank<r>`. Existing files are appended to.
        name: the logger to set up, by default the root logger, which serves all.
        level: lowest level that is logged.

    Raises:
        OSError: the file cannot be written.
    """
    arguments = (str(output), level)
    if name in _current and _current[name][0] == arguments:
        return
    escape_what_cannot_be_printed()
    rank = get_rank() if is_enabled() else TorchDistributedEnvironment().rank
    handlers: list[logging.Handler] = []
    if rank == 0:
        handlers.append(_StdoutHandler())
    if output:
        handlers.append(_file_handler(Path(output), rank))

    logger = logging.getLogger(name)
    for old in _current.get(name, ((), []))[1]:
        _remove(logger, old)
    logger.setLevel(level)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    logging.captureWarnings(True)
    _current[name] = (arguments, handlers)


def cleanup_logging(*, name: str | None = None) -> None:
    """Remove all handlers of a logger, close their files and undo the capture of warnings.

    Args:
        name: the logger that was set up, by default the root logger.
    """
    logger = logging.getLogger(name)
    for handler in list(logger.handlers):
        _remove(logger, handler)
    logger.propagate = True
    logging.captureWarnings(False)
    _current.pop(name, None)


def _remove(logger: logging.Logger, handler: logging.Handler) -> None:
    logger.removeHandler(handler)
    handler.close()


def _file_handler(output: Path, rank: int) -> logging.FileHandler:
    path = output if output.suffix in (".txt", ".log") else output / "logs" / "log.txt"
    if rank > 0:
        path = path.with_name(f"{path.name}.rank{rank}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_Formatter(with_colour=False))
    return handler


class _StdoutHandler(logging.Handler):
    """Writes to the current `sys.stdout`, above progress bars, which show some records themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = _Formatter(with_colour=False)
        self.coloured = _Formatter(with_colour="NO_COLOR" not in os.environ)

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_in_progress_bar", False):
            return
        try:
            stream = sys.stdout
            is_terminal = hasattr(stream, "isatty") and stream.isatty()
            line = (self.coloured if is_terminal else self.plain).format(record)
            with tqdm.external_write_mode(file=stream):
                stream.write(line + "\n")
                stream.flush()
        except Exception:
            self.handleError(record)


class _Formatter(logging.Formatter):
    def __init__(self, *, with_colour: bool) -> None:
        super().__init__(PREFIX + " {message}", DATE_FORMAT, style="{", validate=False)
        self.coloured_format = "{colour}" + PREFIX + RESET + " {message}" if with_colour else None

    def formatMessage(self, record: logging.LogRecord) -> str:
        if self.coloured_format is None:
            return super().formatMessage(record)
        colour = COLOURS.get(record.levelno, COLOURS[logging.ERROR])
        return self.coloured_format.format(colour=colour, **record.__dict__)
