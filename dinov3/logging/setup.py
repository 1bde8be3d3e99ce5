"""Where log messages go: standard output of the main process, and one file for each rank."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from dinov3.distributed import TorchDistributedEnvironment, get_rank, is_enabled

RESET = "\x1b[0m"
COLOURS = {logging.DEBUG: "\x1b[2m", logging.INFO: "\x1b[32m", logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m"}
PREFIX = "{levelname[0]}{asctime} {process} {name} {filename}:{lineno}]"
DATE_FORMAT = "%Y%m%d %H:%M:%S"

# The arguments and handlers of the set-up that is in force, by logger name.
_in_force: dict[str | None, tuple[tuple[Any, ...], list[logging.Handler]]] = {}


def setup_logging(
    output: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    level: int = logging.DEBUG,
    color: bool = True,
    capture_warnings: bool = True,
    log_to_stdout_only_in_main_process: bool = True,
) -> None:
    """Send log messages to standard output and to a file; a second call with equal arguments does nothing.

    Lines read `<level><YYYYmmdd HH:MM:SS> <process id> <logger> <file>:<line>] <message>`.

    Args:
        output: a directory, for the file `logs/log.txt` in it; or a file that ends in `.txt` or `.log`; None for no
            file. Ranks other than 0 append `.rank<r>`. Existing files are appended to.
        name: the logger to set up, by default the root logger, which serves all.
        level: lowest level that is logged.
        color: coloured prefixes where standard output is a terminal (never with the variable `NO_COLOR`).
        capture_warnings: log Python warnings too.
        log_to_stdout_only_in_main_process: rank 0 only, else every rank.

    Raises:
        OSError: the file cannot be written.
    """
    arguments = (str(output), level, color, capture_warnings, log_to_stdout_only_in_main_process)
    if name in _in_force and _in_force[name][0] == arguments:
        return
    rank = get_rank() if is_enabled() else TorchDistributedEnvironment().rank
    handlers: list[logging.Handler] = []
    if rank == 0 or not log_to_stdout_only_in_main_process:
        handlers.append(_StdoutHandler(with_colour=color))
    if output:
        handlers.append(_file_handler(Path(output), rank))

    logger = logging.getLogger(name)
    for old in _in_force.get(name, ((), []))[1]:
        _remove(logger, old)
    logger.setLevel(level)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    if capture_warnings:
        logging.captureWarnings(True)
    _in_force[name] = (arguments, handlers)


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
    _in_force.pop(name, None)


def _remove(logger: logging.Logger, handler: logging.Handler) -> None:
    logger.removeHandler(handler)
    handler.close()


def _file_handler(output: Path, rank: int) -> logging.FileHandler:
    path = output if output.suffix in (".txt", ".log") else output / "logs" / "log.txt"
    if rank > 0:
        path = path.with_name(f"{path.name}.rank{rank}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Formatter(with_colour=False))
    return handler


class _StdoutHandler(logging.Handler):
    """Writes to whatever `sys.stdout` is at the time, above progress bars, which show some records themselves."""

    def __init__(self, *, with_colour: bool) -> None:
        super().__init__()
        self.plain = _Formatter(with_colour=False)
        self.coloured = _Formatter(with_colour=with_colour and "NO_COLOR" not in os.environ)

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_in_progress_bar", False):
            return
        try:
            stream = sys.stdout
            line = (self.coloured if _is_terminal(stream) else self.plain).format(record)
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


def _is_terminal(stream: TextIO) -> bool:
    return hasattr(stream, "isatty") and stream.isatty()
