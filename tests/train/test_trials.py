"""Flags that try a training out: one step, a benchmark, a profile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dinov3.train import main

from . import tiny


@pytest.fixture
def config(tmp_path: Path) -> Path:
    images = tiny.write_images(tmp_path / "images")
    return tiny.write_config(tmp_path / "tiny.yaml", images, train={"OFFICIAL_EPOCH_LENGTH": 4})


def test_dry_run_takes_a_step_and_writes_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    metrics = main(
        ["--config-file", str(config), "--dry-run", "--output-dir", str(tmp_path / "out"), "train.tensorboard=true"]
    )
    assert metrics["total_loss"] > 0 and metrics["seconds"] > 0
    assert "dry run: everything works; nothing was written" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_finds_missing_data(config: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(["--config-file", str(config), "--dry-run", f"train.dataset_path=ImageFolder:root={tmp_path}/nowhere"])


def test_benchmark_needs_no_data(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov3.train.preflight.N_WARM_UP_STEPS", 1)
    before = sorted(tmp_path.rglob("*"))
    figures = main(
        [
            *("--config-file", str(config), "--benchmark-codebase"),
            *("train.dataset_path=ImageFolder:root=/nowhere", "train.grad_accumulation_steps=2"),
            *("crops.global_crops_size=[16,32]", "crops.local_crops_size=[16,16]"),
            "crops.global_local_crop_pairs_ratios=[1,1]",
        ]
    )
    assert 0 < figures["fastest"] <= figures["seconds"] <= figures["slowest"]
    assert figures["images_per_second"] == pytest.approx(8 / figures["seconds"])
    out = capsys.readouterr().out
    assert "benchmark: 20 steps of 8 images" in out and "MiB" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_profile_names_operators(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    main(["--config-file", str(config), "--profiling", "--output-dir", str(output)])
    trace = json.loads((output / "profile" / "trace.rank0.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#4", "ProfilerStep#5", "ProfilerStep#6"}
    assert "aten::" in (output / "profile" / "operators.rank0.txt").read_text()
    assert len(tiny.read_losses(output)) == 8
