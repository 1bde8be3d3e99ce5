"""A run that was stopped and resumed repeats an uninterrupted one bit for bit; `test_kill` really kills."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dinov3.checkpointer import find_all_checkpoints, latest_valid_checkpoint, save_checkpoint
from dinov3.configs import get_default_config
from dinov3.train import main
from dinov3.train.resuming import report_changes, run_metadata

from . import tiny


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tiny.write_config(tmp_path / "tiny.yaml", tiny.write_images(tmp_path / "images"))


def arguments(config: Path, output_dir: Path, *options: str) -> list[str]:
    return ["--config-file", str(config), "--output-dir", str(output_dir), *options]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_stopped_and_resumed_run_equals_uninterrupted_run(config: Path, tmp_path: Path) -> None:
    options = ["train.OFFICIAL_EPOCH_LENGTH=3", "checkpointing.period=2", "train.num_workers=2"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    main(arguments(config, whole, *options))
    tiny.copy_as_killed(whole, resumed, after=3)
    main(arguments(config, resumed, *options))
    assert tiny.read_losses(resumed) == tiny.read_losses(whole)
    tiny.assert_same_weights(tiny.read_teacher(resumed), tiny.read_teacher(whole))


def test_damaged_newest_checkpoint_is_set_aside(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    main(arguments(config, output, "train.OFFICIAL_EPOCH_LENGTH=3", "checkpointing.period=2"))
    newest = latest_valid_checkpoint(output / "ckpt")
    assert newest is not None and newest.name == "5"
    shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)

    main(arguments(config, output, "train.OFFICIAL_EPOCH_LENGTH=3", "checkpointing.period=2"))

    assert (output / "ckpt" / "5.corrupt").is_dir()
    assert sorted(tiny.read_losses(output)) == list(range(6))


def test_no_resume_starts_over_and_keeps_the_old_checkpoints(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    short = ["train.OFFICIAL_EPOCH_LENGTH=1", "checkpointing.period=1"]
    main(arguments(config, output, *short))
    main(arguments(config, output, "--no-resume", *short))

    assert [d.name for d in find_all_checkpoints(output / "ckpt")] == ["0", "1"]
    (aside,) = output.glob("ckpt.before-*")
    assert [d.name for d in find_all_checkpoints(aside)] == ["0", "1"]
    assert sorted(tiny.read_losses(output)) == [0, 1]


def test_changed_settings_are_named_when_a_run_goes_on(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    short = ["train.OFFICIAL_EPOCH_LENGTH=1", "checkpointing.period=1"]
    main(arguments(config, output, *short))
    main(arguments(config, output, *short, "optim.epochs=3", "optim.clip_grad=0.5", "train.num_workers=1"))
    log = (output / "logs" / "log.txt").read_text()
    (warning,) = [line for line in log.splitlines() if "the run continues with other settings than before" in line]
    assert "optim.clip_grad: 3.0 before, 0.5 now; optim.epochs: 2 before, 3 now" in warning
    assert "num_workers" not in warning


def test_data_that_grew_before_a_resume_are_named(config: Path, tmp_path: Path) -> None:
    output, short = tmp_path / "run", ["train.OFFICIAL_EPOCH_LENGTH=1", "checkpointing.period=1"]
    main(arguments(config, output, *short))
    images = Path(str(OmegaConf.load(config).train.dataset_path).partition("root=")[2])
    main(arguments(config, output, *short, "optim.epochs=3"))
    assert "training images before" not in (output / "logs" / "log.txt").read_text()
    shutil.copy(images / "even" / "0.png", images / "even" / "99.png")
    n_images = len(list(images.rglob("*.png")))
    main(arguments(config, output, *short, "optim.epochs=4"))
    assert f"{n_images - 1} training images before, {n_images} now" in (output / "logs" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("dataset", "is_named"), [("ImageFolder:root=a", False), ("WebDataset:urls=a:mode=stream", True)]
)
def test_another_number_of_workers_is_named_where_it_changes_the_order(
    dataset: str, is_named: bool, tmp_path: Path
) -> None:
    cfg = OmegaConf.merge(get_default_config(), {"train": {"dataset_path": dataset, "num_workers": 1}})
    save_checkpoint(tmp_path / "0", iteration=0, model=torch.nn.Linear(1, 1), metadata=run_metadata(cfg))
    cfg.train.num_workers = 3
    assert report_changes(tmp_path / "0", cfg) == (["train.num_workers: 1 before, 3 now"] if is_named else [])
