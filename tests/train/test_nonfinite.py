"""A loss that is not finite stops the run before anything is broken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.checkpointer import find_all_checkpoints
from dinov3.train.data_loading import build_train_loader
from dinov3.train.loop import Trainer
from dinov3.train.networks import local_part
from dinov3.train.schedules import StepSettings
from dinov3.train.step import NonFiniteLossError, train_step
from dinov3.train.train import build_model
from tests.multiprocess import run_ranks

from . import test_world_size as world
from . import tiny


def make_trainer(tmp_path: Path, **train: Any) -> Trainer:
    return tiny.make_trainer(tmp_path, period=2, **train)


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


def overflow_on_the_last_rank(rank: int, world_size: int) -> tuple[str | None, bool]:
    """A step in which one rank's loss is finite and its gradients are not: what is said, and if nothing changed."""
    model = build_model(world.config()).train()
    model.init_weights()
    backprop = model.backprop_loss
    if rank == world_size - 1:
        model.backprop_loss = lambda loss: backprop(loss * torch.inf)  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(model.get_params_groups())
    before = {name: local_part(entry).clone() for name, entry in model.state_dict().items()}
    own = world.split(rank, world_size)
    settings = StepSettings(lr=1e-3, weight_decay=0.04, momentum=0.9, teacher_temp=0.07, last_layer_lr=1e-3)
    result = train_step(model, optimizer, world.make_batch(own, own), settings, iteration=7, clip_grad=1.0)
    is_same = all(torch.equal(local_part(entry), before[name]) for name, entry in model.state_dict().items())
    return result.problem, is_same and not optimizer.state


@pytest.mark.distributed
def test_infinite_gradients_of_one_rank_stop_the_step_on_all() -> None:
    for problem, is_untouched in run_ranks(overflow_on_the_last_rank, 2):
        assert is_untouched
        assert problem is not None and problem.startswith("step 7: backbone_grad_norm, dino_head_grad_norm")
        assert "not finite on 2 of 2 ranks" in problem and "gradients not finite in backbone." in problem
