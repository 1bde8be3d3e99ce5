"""Memory that reading a checkpoint takes: about its largest tensor, never a second copy of the model."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from dinov3.checkpointer import load_checkpoint, read_tensors, save_checkpoint
from dinov3.checkpointer.consolidate import consolidate
from tests.multiprocess import start

N_LAYERS, WIDTH = 30, 1024
LAYER_MIB = WIDTH * WIDTH * 4 / 2**20


def make(n_layers: int, width: int) -> nn.Module:
    layers = (nn.Linear(width, width, bias=False) for _ in range(n_layers))
    return nn.ModuleDict({"backbone": nn.ModuleList(layers)})


def anonymous_mib() -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


def growth(action: Callable[[], object]) -> float:
    """The most memory that the action holds at any time, in MiB."""
    done, peak = threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_mib())

    before = anonymous_mib()
    thread = threading.Thread(target=watch)
    thread.start()
    result = action()
    peak[0] = max(peak[0], anonymous_mib())  # with the result still held, however late the thread looks
    del result
    done.set()
    thread.join()
    return peak[0] - before


def measure(root: Path) -> None:
    # A child writes the checkpoint, so that this process has no memory left over from it that could be used again.
    if (child := os.fork()) == 0:
        save_checkpoint(root / "large", iteration=1, model=make(N_LAYERS, WIDTH))
        save_checkpoint(root / "small", iteration=1, model=make(1, 2))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    # What the first call of each imports and caches is not counted.
    consolidate(root / "small", root / "small.pth")
    consolidate(root / "small", root / "small.safetensors", safetensors=True)
    load_checkpoint(root / "small", model=make(1, 2))
    model = make(N_LAYERS, WIDTH)
    figures = {
        "pth": growth(lambda: consolidate(root / "large", root / "large.pth")),
        "safetensors": growth(lambda: consolidate(root / "large", root / "large.safetensors", safetensors=True)),
        "resume": growth(lambda: load_checkpoint(root / "large", model=model)),
        "copy": growth(lambda: read_tensors(root / "large")),
    }
    (root / "figures.json").write_text(json.dumps(figures))


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to measure memory")
def test_consolidating_and_resuming_hold_no_copy_of_the_model(tmp_path: Path) -> None:
    process = start(measure, tmp_path, output=tmp_path / "said.txt")
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "said.txt").read_text()
    mib = json.loads((tmp_path / "figures.json").read_text())
    model_mib = N_LAYERS * LAYER_MIB
    assert mib["copy"] > 0.9 * model_mib, "the measurement does not see what it should"
    for name in ("pth", "safetensors", "resume"):
        assert mib[name] < 8 * LAYER_MIB, f"{name}: {mib[name]:.0f} MiB for a model of {model_mib:.0f} MiB"
