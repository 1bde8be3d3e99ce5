"""Windows: what Python lacks there is not needed to import anything, to read data, or to begin a run."""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import sys
from pathlib import Path

from tests.data.tars import png, write_tar
from tests.multiprocess import run_ranks

MODULES = ("fcntl", "resource", "termios", "pwd", "grp")
OF_OS = (
    "fork",
    "register_at_fork",
    "getuid",
    "setpgid",
    "killpg",
    "pread",
    "statvfs",
    "sched_getaffinity",
    "O_CLOEXEC",
)
OF_SIGNAL = ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGALRM")


def hide_what_windows_lacks() -> None:
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # this is how Python marks what cannot be imported
    for name in OF_OS:
        delattr(os, name)
    for name in OF_SIGNAL:
        delattr(signal, name)


def work_as_on_windows(rank: int, world_size: int, directory: Path) -> dict[str, object]:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("dinov3", "hubconf")]:
        del sys.modules[name]
    hide_what_windows_lacks()
    import dinov3

    problems = []
    for module in pkgutil.walk_packages(dinov3.__path__, "dinov3."):
        try:
            importlib.import_module(module.name)
        except (ModuleNotFoundError, AttributeError) as error:
            problems.append(f"{module.name}: {error!r}")

    from dinov3.checkpointer import RunLock
    from dinov3.data.datasets import WebDataset
    from dinov3.data.loaders import init_worker
    from dinov3.distributed import runtime
    from dinov3.env import set_triton_cache_dir
    from dinov3.train.preemption import Preemption

    dataset = WebDataset(urls=str(directory / "a.tar"))
    set_triton_cache_dir()
    init_worker(0)
    with RunLock(directory / "run"), Preemption():
        grays = [dataset[index][0].getpixel((0, 0))[0] for index in (2, 0, 1)]
    return {"problems": problems, "grays": grays, "memory": runtime.max_memory_mib()}


def test_everything_is_imported_and_data_are_read_without_what_windows_lacks(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"{number}.png": png(number) for number in range(3)})
    (result,) = run_ranks(work_as_on_windows, 1, tmp_path)
    assert result == {"problems": [], "grays": [2, 0, 1], "memory": 0.0}
