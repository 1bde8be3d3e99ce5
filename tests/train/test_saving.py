"""When a run saves itself, and what happens when it cannot."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from dinov3.checkpointer import BackgroundSaver, CheckpointError, find_all_checkpoints, saving
from dinov3.configs import DinoV3SetupArgs, setup_config
from dinov3.train.data_loading import build_train_loader
from dinov3.train.loop import Trainer
from dinov3.train.preemption import Preemption
from dinov3.train.saving import Saver
from dinov3.train.train import build_model
from dinov3.utils import fix_random_seeds
from dinov3.utils.files import DiskFullError

from . import tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def make_saver(root: Path, **settings: Any) -> Saver:
    checkpointing = {"max_to_keep": 2, "keep_every": 4, "max_seconds": None, "async_save": False} | settings
    return Saver(OmegaConf.create({"checkpointing": checkpointing}), root)


def save(saver: Saver, iteration: int) -> None:
    model = nn.Linear(2, 2)
    saver.save(iteration, model=model, optimizer=torch.optim.AdamW(model.parameters()))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("async_save", [False, True])
def test_old_checkpoints_go_and_some_are_kept_for_ever(tmp_path: Path, async_save: bool) -> None:
    saver = make_saver(tmp_path, async_save=async_save)
    for iteration in (1, 3, 5, 7, 9):
        save(saver, iteration)
    saver.finish()
    assert names(tmp_path) == ["3_keep", "7", "7_keep", "9"] and saver.newest == 9 and not saver.is_running


def test_clock_makes_a_checkpoint_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("dinov3.train.saving.time.monotonic", lambda: now)
    saver = make_saver(tmp_path, max_seconds=10)
    assert not saver.is_due
    now = 110.0
    assert saver.is_due
    save(saver, 1)
    assert not saver.is_due
    assert not make_saver(tmp_path).is_due


@pytest.mark.parametrize("async_save", [False, True])
def test_one_failure_is_tolerated_and_a_second_in_a_row_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, async_save: bool
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saver = make_saver(tmp_path, async_save=async_save)
    save(saver, 1)
    saver.finish()
    for iteration in (3, 7):
        with monkeypatch.context() as patch:
            patch.setattr(saving, "write_manifest", fail)
            save(saver, iteration)
            saver.finish()
        assert "No space left on device; training continues" in caplog.text
        caplog.clear()
        assert names(tmp_path) == ["1"] if iteration == 3 else ["1", "5"]
        if iteration == 3:
            save(saver, 5)
            saver.finish()
    monkeypatch.setattr(saving, "write_manifest", fail)
    with pytest.raises(
        CheckpointError, match=rf"No space left.*second failure in a row; newest checkpoint: {tmp_path}/5"
    ):
        save(saver, 9)
        saver.finish()
    assert saver.newest == 5 and names(tmp_path) == ["1", "5"]


def test_a_full_disk_ends_a_training_with_its_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny.make_trainer(tmp_path, period=2)
    step = trainer.step

    def step_until_full(batches: Any, iteration: int) -> Any:
        if iteration == 2:
            path = tmp_path / "out" / "training_metrics.json"
            path.unlink()
            path.symlink_to("/dev/full")
        return step(batches, iteration)

    monkeypatch.setattr(trainer, "step", step_until_full)
    message = rf"No space left on device for .*metrics\.json: .* GiB free.* Newest checkpoint: {tmp_path}/out/ckpt/1$"
    with pytest.raises(DiskFullError, match=message):
        trainer.run()


def signalled(loader: Any, at_batch: int) -> Iterator[Any]:
    for index, batch in enumerate(loader):
        if index == at_batch:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


def test_training_saves_by_the_clock_and_in_the_background(tmp_path: Path) -> None:
    config = tiny.write_config(
        tmp_path / "tiny.yaml",
        tiny.write_images(tmp_path / "images"),
        train={"OFFICIAL_EPOCH_LENGTH": 3},
        # Every step is late, so each saves; the period alone would never.
        checkpointing={"period": 1000, "max_seconds": 1e-9, "async_save": True, "max_to_keep": None},
    )
    cfg = setup_config(DinoV3SetupArgs(config_file=str(config), output_dir=str(tmp_path / "out")))
    fix_random_seeds(0)
    with Preemption() as stop, pytest.raises(SystemExit):
        trainer = Trainer(cfg, build_model(cfg), preemption=stop)
        assert isinstance(trainer.saver._in_background, BackgroundSaver)
        trainer.run(data_loader=signalled(build_train_loader(cfg), 2))
    # What was in progress when the signal came is complete.
    assert [path.name for path in find_all_checkpoints(tmp_path / "out" / "ckpt")] == ["0", "1", "2"]
