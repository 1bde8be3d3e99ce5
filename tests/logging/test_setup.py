from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import re
import select
import struct
import sys
import termios
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dinov3.logging import MetricLogger, cleanup_logging, setup_logging
from tests.multiprocess import run_ranks, start

NAME = "dinov3-test"
LINE = re.compile(r"^I\d{8} \d\d:\d\d:\d\d \d+ dinov3-test test_setup\.py:\d+\] hello$")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    cleanup_logging(name=NAME)


def test_lines_go_to_standard_output_and_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path / "run", name=NAME)
    logging.getLogger(NAME).info("hello")
    assert LINE.match(capsys.readouterr().out.rstrip("\n"))
    assert LINE.match((tmp_path / "run" / "logs" / "log.txt").read_text().rstrip("\n"))


@pytest.mark.parametrize("name", ["a.txt", "b.log"])
def test_output_may_be_a_file_and_is_appended_to(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("before\n")
    setup_logging(str(path), name=NAME)
    logging.getLogger(NAME).info("hello")
    assert path.read_text().startswith("before\nI")


def test_second_call_adds_nothing_and_other_arguments_replace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        setup_logging(tmp_path / "one", name=NAME)
    setup_logging(tmp_path / "two", name=NAME)
    logging.getLogger(NAME).info("hello")
    assert capsys.readouterr().out.count("hello") == 1
    assert "hello" not in (tmp_path / "one" / "logs" / "log.txt").read_text()
    assert (tmp_path / "two" / "logs" / "log.txt").read_text().count("hello") == 1


def test_level_is_honoured_and_named_logger_does_not_propagate(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    setup_logging(name=NAME, level=logging.WARNING)
    logging.getLogger(NAME).info("quiet")
    logging.getLogger(NAME).warning("loud")
    assert "quiet" not in (out := capsys.readouterr().out) and out.startswith("W")
    assert not caplog.records


def test_cleanup_removes_every_handler_and_closes_files(tmp_path: Path) -> None:
    setup_logging(tmp_path, name=NAME)
    logger = logging.getLogger(NAME)
    logger.addHandler(logging.NullHandler())
    files = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    assert len(files) == 1 and len(logger.handlers) == 3
    cleanup_logging(name=NAME)
    assert logger.handlers == [] and logger.propagate
    assert files[0].stream is None
    setup_logging(tmp_path, name=NAME)
    assert len(logger.handlers) == 2


def test_warnings_are_captured_until_cleanup() -> None:
    original = warnings.showwarning
    setup_logging(name=NAME)
    assert warnings.showwarning is not original
    cleanup_logging(name=NAME)
    assert warnings.showwarning is original


def test_standard_output_needs_no_file_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    setup_logging(name=NAME)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    logging.getLogger(NAME).info("hello")
    assert LINE.match(sys.stdout.getvalue().rstrip("\n"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_prefix_is_coloured_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    setup_logging(name=NAME)
    monkeypatch.setattr(sys, "stdout", Terminal())
    logging.getLogger(NAME).info("hello")
    assert re.match(r"\x1b\[32mI.*\]\x1b\[0m hello\n", sys.stdout.getvalue())
    cleanup_logging(name=NAME)
    monkeypatch.setenv("NO_COLOR", "1")
    setup_logging(name=NAME)
    monkeypatch.setattr(sys, "stdout", Terminal())
    logging.getLogger(NAME).info("hello")
    assert LINE.match(sys.stdout.getvalue().rstrip("\n"))


def log_in_rank(rank: int, world_size: int, directory: str) -> str:
    sys.stdout = io.StringIO()
    setup_logging(directory, name=NAME)
    logging.getLogger(NAME).info("from rank %d", rank)
    return sys.stdout.getvalue()


@pytest.mark.distributed
def test_each_rank_has_its_file_and_rank_0_the_standard_output(tmp_path: Path) -> None:
    first, second = run_ranks(log_in_rank, 2, str(tmp_path))
    assert "] from rank 0" in first and second == ""
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["log.txt", "log.txt.rank1"]
    assert "from rank 1" in (tmp_path / "logs" / "log.txt.rank1").read_text()


def show_bar_and_lines() -> None:
    setup_logging(level=logging.INFO)
    metrics = MetricLogger()
    for i in metrics.log_every(range(4), 2, header="Training"):
        metrics.update(total_loss=0.5 + i, images_per_second=100)
        logging.getLogger("dinov3").info("message %d", i)


def run_on_a_terminal(function: Callable[[], None]) -> str:
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = start(function, output=Path(os.ttyname(terminal)))
    chunks: list[bytes] = []
    while process.is_alive() or select.select([controller], [], [], 0)[0]:
        if select.select([controller], [], [], 0.05)[0]:
            chunks.append(os.read(controller, 4096))
    process.join()
    os.close(terminal)
    os.close(controller)
    assert process.exitcode == 0
    return b"".join(chunks).decode()


def test_progress_bar_and_log_lines_share_a_terminal() -> None:
    shown = run_on_a_terminal(show_bar_and_lines)
    # What is left of each line on a screen: what was written after the last carriage return.
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in shown.split("\n")]
    for i in range(4):
        assert sum(bool(re.search(rf"test_setup\.py:\d+\]\S* message {i}$", line)) for line in lines) == 1, lines
    assert "loss 0.5" in shown and "100 images/s" in shown and "waits for data" in shown and "4/4" in shown
    assert "eta:" not in shown  # the log line is for files and pipes
