"""A loss that is not finite stops the run before anything is broken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.checkpointer import find_all_checkpoints
from dinov3.configs import DinoV3SetupArgs, setup_config
from dinov3.train.data_loading import build_train_loader
from dinov3.train.loop import Trainer
from dinov3.train.step import NonFiniteLossError
from dinov3.train.train import build_model

from . import tiny


def make_trainer(tmp_path: Path, **train: Any) -> Trainer:
    config = tiny.write_config(
        tmp_path / "tiny.yaml",
        tiny.write_images(tmp_path / "images"),
        train={"OFFICIAL_EPOCH_LENGTH": 3} | train,
        checkpointing={"period": 2},
    )
    cfg = setup_config(DinoV3SetupArgs(config_file=str(config), output_dir=str(tmp_path / "out")))
    return Trainer(cfg, build_model(cfg))


def poisoned(loader: Any, bad_batches: set[int]) -> Iterator[dict[str, Any]]:
    for number, batch in enumerate(loader):
        if number in bad_batches:
            batch["collated_global_crops"][0, 0, 0, 0] = torch.nan
        yield batch


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_run_stops_with_the_step_and_the_terms_and_keeps_the_good_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"step 3: .*total_loss.*dino_global_crops_loss = nan") as raised:
        trainer.run(data_loader=poisoned(build_train_loader(trainer.cfg), {3}))
    assert "ckpt/1" in str(raised.value) and "max_nonfinite_steps" in str(raised.value)
    assert [path.name for path in find_all_checkpoints(trainer.checkpoint_root)] == ["1"]
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_dropped_step_changes_neither_student_nor_teacher_nor_optimizer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_nonfinite_steps=1)
    before: dict[str, Any] = {}
    handle = trainer._handle_nonfinite

    def spy(result: Any) -> None:
        if result.problem is not None:
            before["after_drop"] = weights(trainer)
            before["steps"] = [int(s["step"]) for s in trainer.optimizer.state.values()]
        else:
            before["last_good"] = weights(trainer)
        handle(result)

    trainer._handle_nonfinite = spy  # type: ignore[method-assign]
    batches = poisoned(build_train_loader(trainer.cfg), {5})  # the last of six
    trainer.run(data_loader=batches)

    assert trainer.nonfinite_in_a_row == 1
    tiny.assert_same_weights(before["last_good"], before["after_drop"])
    assert set(before["steps"]) == {5}


def test_too_many_in_a_row_stop_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_nonfinite_steps=1)
    with pytest.raises(NonFiniteLossError, match="step 4"):
        trainer.run(data_loader=poisoned(build_train_loader(trainer.cfg), {3, 4}))


def test_separated_ones_do_not_add_up(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_nonfinite_steps=1)
    trainer.run(data_loader=poisoned(build_train_loader(trainer.cfg), {1, 3}))
    lines = tiny.read_metrics(trainer.output_dir)
    assert len(lines) == 6 and "total_loss" in lines[1].get("nonfinite", [])
