"""What all tests share: they run on the CPU even if there is a GPU, except those marked `gpu`, which need one."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Generator, Iterator

import pytest
import torch

os.environ.setdefault("DINOV3_DEVICE", "cpu")  # inherited by the processes that tests start


@pytest.fixture(scope="session", autouse=True)
def feature_cache() -> Iterator[None]:
    """Let evaluations keep features on disk for this session only."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        os.environ["DINOV3_FEATURE_CACHE"] = directory
        yield


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """Undo what PyTorch's launcher leaves behind in a process that it ran in: its handler would end later tests."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if signal.getsignal(signal.SIGTERM) is not before:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def pytest_collection_finish() -> None:
    # Everything so far lives until the end; garbage collections need not look at PyTorch and thousands of tests again.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # Logs may hold file names that are not UTF-8, which pytest-xdist could not send.
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests first, so that what remains at the end is short and no worker waits long for another.
    slow_files = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow_files)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
