"""Memory that reading a checkpoint takes: about its largest tensor, never a second copy of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
N_LAYERS, WIDTH = 30, 1024
LAYER_MIB = WIDTH * WIDTH * 4 / 2**20

# A child writes the checkpoint, so that this process has no memory left over from it that could be used again.
MEASURE = """
    import json, os, sys, threading
    from pathlib import Path
    import torch
    from torch import nn
    from dinov3.checkpointer import load_checkpoint, read_tensors, save_checkpoint
    from dinov3.checkpointer.consolidate import consolidate

    root, n_layers, width = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

    def make():
        return nn.ModuleDict({"backbone": nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(n_layers))})

    def anonymous_mib():
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                return int(line.split()[1]) / 1024

    def growth(action):
        done, peak = threading.Event(), [0.0]
        def watch():
            while not done.wait(0.001):
                peak[0] = max(peak[0], anonymous_mib())
        before = anonymous_mib()
        thread = threading.Thread(target=watch)
        thread.start()
        action()
        done.set()
        thread.join()
        return peak[0] - before

    if (child := os.fork()) == 0:
        torch.set_num_threads(1)
        save_checkpoint(root / "large", iteration=1, model=make())
        save_checkpoint(root / "small", iteration=1, model=nn.ModuleDict({"backbone": nn.Linear(2, 2)}))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

    # What the first call of each imports and caches is not counted.
    consolidate(root / "small", root / "small.pth")
    consolidate(root / "small", root / "small.safetensors", safetensors=True)
    load_checkpoint(root / "small", model=nn.ModuleDict({"backbone": nn.Linear(2, 2)}))
    figures = {
        "pth": growth(lambda: consolidate(root / "large", root / "large.pth")),
        "safetensors": growth(lambda: consolidate(root / "large", root / "large.safetensors", safetensors=True)),
    }
    model = make()
    figures["resume"] = growth(lambda: load_checkpoint(root / "large", model=model))
    figures["copy"] = growth(lambda: read_tensors(root / "large"))
    print(json.dumps(figures))
"""


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to measure memory")
def test_consolidating_and_resuming_hold_no_copy_of_the_model(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path), str(N_LAYERS), str(WIDTH)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DINOV3_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    mib = json.loads(done.stdout)
    model_mib = N_LAYERS * LAYER_MIB
    assert mib["copy"] > 0.9 * model_mib, "the measurement does not see what it should"
    for name in ("pth", "safetensors", "resume"):
        assert mib[name] < 8 * LAYER_MIB, f"{name}: {mib[name]:.0f} MiB for a model of {model_mib:.0f} MiB"
