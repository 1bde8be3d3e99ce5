"""Strictness of `load_checkpoint`: what does not fit is listed, and nothing is loaded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinov3.checkpointer import CheckpointError, load_checkpoint, save_checkpoint

from . import toy


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model, optimizer = toy.make()
    toy.train(model, optimizer, range(2))
    save_checkpoint(tmp_path / "1", iteration=1, model=model, optimizer=optimizer)
    return tmp_path / "1"


def refusal(checkpoint: Path, model: nn.Module, **arguments: Any) -> str:
    """The message of the error, after a check that `model` is as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="does not fit this model") as caught:
        load_checkpoint(checkpoint, model=model, **arguments)
    toy.assert_equal(model.state_dict(), before)
    return str(caught.value)


def test_other_head_size_is_listed_with_both_shapes(checkpoint: Path) -> None:
    message = refusal(checkpoint, toy.make(n_prototypes=7)[0])
    assert "model.student.dino_head.weight: saved [6, 8], here [7, 8]" in message
    assert "backbone" not in message.splitlines()[1]


def test_guess_names_the_settings_of_heads(checkpoint: Path) -> None:
    model = toy.make(n_prototypes=7)[0]
    del model.center
    model.register_buffer("center", torch.zeros(1, 6))
    assert "Only heads differ: compare dino.head_*" in refusal(checkpoint, model)


def test_other_architecture_is_listed_and_guessed(checkpoint: Path) -> None:
    message = refusal(checkpoint, toy.make(width=4)[0])
    assert "model.student.backbone.norm.weight: saved [8], here [4]" in message
    assert "The backbone differs: compare student.arch" in message and "and 10 more" in message


def test_missing_and_unexpected_entries_are_listed(checkpoint: Path) -> None:
    model = toy.make()[0]
    model.student["ibot_head"] = nn.Linear(8, 2)
    del model.student["dino_head"]
    message = refusal(checkpoint, model)
    assert "2 missing: model.student.ibot_head.weight, model.student.ibot_head.bias" in message
    assert "2 unexpected: model.student.dino_head" in message


def test_loading_in_part_is_a_warning_on_request(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = toy.make(seed=1)[0]
    model.student["ibot_head"] = nn.Linear(8, 2)
    before = model.student["ibot_head"].weight.clone()
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        assert load_checkpoint(checkpoint, model=model, strict_loading=False) == 1
    assert "is loaded in part" in caplog.text and "2 missing: model.student.ibot_head" in caplog.text
    assert torch.equal(model.student["ibot_head"].weight, before)
    with pytest.raises(CheckpointError, match="of a different shape"):
        load_checkpoint(checkpoint, model=toy.make(width=4)[0], strict_loading=False)


def test_checkpoint_without_optimizer_cannot_resume_one(tmp_path: Path) -> None:
    model, optimizer = toy.make()
    save_checkpoint(tmp_path / "1", iteration=1, model=model)
    assert "Only the optimizer differs" in refusal(tmp_path / "1", model, optimizer=optimizer)


def test_parameter_without_gradient_so_far_resumes_without_state(tmp_path: Path) -> None:
    model, optimizer = toy.make()
    frozen = model.student["dino_head"].bias.requires_grad_(False)
    toy.train(model, optimizer, range(2))
    save_checkpoint(tmp_path / "1", iteration=1, model=model, optimizer=optimizer)
    resumed, resumed_optimizer = toy.make(seed=1)
    load_checkpoint(tmp_path / "1", model=resumed, optimizer=resumed_optimizer)
    assert resumed.student["dino_head"].bias not in resumed_optimizer.state
    frozen.requires_grad_(True)
    for each in ((model, optimizer), (resumed, resumed_optimizer)):
        toy.train(*each, range(2, 4))
    toy.assert_equal(resumed.state_dict(), model.state_dict())


def test_other_object_that_was_not_saved_stays_with_a_warning(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Untouchable:
        def load_state_dict(self, state: Any) -> None:
            raise AssertionError(state)

    with caplog.at_level(logging.WARNING, logger="dinov3"):
        load_checkpoint(checkpoint, model=toy.make()[0], rng=Untouchable())
    assert "has no 'rng'" in caplog.text


@pytest.mark.parametrize("name", ["teacher", "model_ema"])
def test_teacher_is_found_under_either_name(tmp_path: Path, name: str) -> None:
    model = toy.make(seed=0)[0]
    saved = nn.ModuleDict({"student": model.student, name: model.model_ema})
    saved.register_buffer("center", model.center)
    save_checkpoint(tmp_path / "1", iteration=1, model=saved)
    loaded = toy.make(seed=1)[0]
    load_checkpoint(tmp_path / "1", model=loaded)
    toy.assert_equal(loaded.state_dict(), model.state_dict())
