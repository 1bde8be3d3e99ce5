"""The README's examples of depth and segmentation, word for word, with small stand-ins for weights and backbones."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.hub import depthers
from tests.eval.dense import scenes
from tests.heads.tiny import make_published_depthers_small

REPOSITORY = Path(__file__).parents[3]
SHORTER = ("scheduler.total_iter=2", "scheduler.constructor_kwargs.warmup_iters=1", "num_workers=0")


def blocks(language: str) -> list[str]:
    """The code of the README's section."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Depth and segmentation") : text.index("## Load what you trained")]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def write_photo(directory: Path) -> None:
    scenes.scene(3)[0].resize((100, 75)).save(directory / "photo.jpg")


def test_depth_of_the_released_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_published_depthers_small(monkeypatch)
    twin = depthers.dinov3_vit7b16_dd(pretrained=False)
    torch.save(twin.encoder.backbone.state_dict(), tmp_path / "vit7b16.pth")
    torch.save(twin.decoder.state_dict(), tmp_path / "dpt_head.pth")
    write_photo(tmp_path)

    def load(directory: str, entry: str, source: str, **options: Any) -> Any:
        assert (directory, source) == (".", "local")  # of the clone, where hubconf.py lies
        return getattr(depthers, entry)(**options)

    monkeypatch.setattr(torch.hub, "load", load)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    assert names["depth"].shape == (1, 1, 75, 100)
    assert bool(names["depth"].isfinite().all()) and names["depth"].min() > 0


def test_help_of_the_scripts_lists_their_keys() -> None:
    # By their paths, which put their directories and not the repository on the path of imports.
    keys = {
        "depth": ("datasets.root", "decoder_head.bins_strategy", "model.dino_hub", "losses"),
        "segmentation": ("datasets.root", "decoder_head.dropout", "model.dino_hub", "eval.stride"),
    }
    scripts = {task: REPOSITORY / "dinov3" / "eval" / task / "run.py" for task in keys}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    started = {
        task: subprocess.Popen([sys.executable, script, "--help"], stdout=subprocess.PIPE, text=True, env=environment)
        for task, script in scripts.items()
    }
    for task, process in started.items():
        text, _ = process.communicate()
        assert process.returncode == 0 and all(name in text for name in keys[task])


@pytest.mark.slow
def test_heads_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "outputs" / "demo" / "run"
    run.mkdir(parents=True)
    (tmp_path / "dinov3").symlink_to(REPOSITORY / "dinov3")
    scenes.write_run(run)
    write_photo(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DINOV3_DEVICE", "cpu")
    variables: dict[str, str] = {}
    (script,) = blocks("bash")
    for line in script.splitlines():
        if assignment := re.fullmatch(r'(\w+)="(.*)"', line):
            variables[assignment[1]] = assignment[2]
            continue
        command = shlex.split(string.Template(line).substitute(variables))
        module = command[2] if command[1] == "-m" else command[1].removesuffix(".py").replace("/", ".")
        options = command[3:] if command[1] == "-m" else [*command[2:], *SHORTER]
        assert not importlib.import_module(module).main(options)
    outputs = tmp_path / "outputs"
    assert (outputs / "depth" / "results-depth.csv").is_file()
    assert (outputs / "segmentation" / "results-semantic-segmentation.csv").is_file()
    n_images = {
        task: len(list((outputs / "dense" / task / "images" / "val").iterdir())) for task in ("depth", "segmentation")
    }
    assert len(list((outputs / "depth_pictures").glob("*_depth.png"))) == n_images["depth"]
    masks = list((outputs / "segmentation_pictures").glob("*_labels.png"))
    assert len(masks) == n_images["segmentation"]
    assert all(np.asarray(Image.open(mask)).max() <= 3 for mask in masks)

    names: dict[str, Any] = {}
    exec(blocks("python")[1], names)
    assert names["depth"].shape == names["labels"].shape == (75, 100)
    assert (names["depth"].dtype, names["labels"].dtype) == (np.float32, np.int64)
