"""Looking into a checkpoint and taking a network out of it, without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dinov3.checkpointer import CheckpointError, consolidate, init_fsdp_model_from_checkpoint, inspect, save_checkpoint

from . import toy
from .test_verification import flip_a_bit


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, toy.Toy]:
    model, optimizer = toy.make()
    toy.train(model, optimizer, range(2))
    save_checkpoint(tmp_path / "ckpt" / "1", iteration=1, model=model, optimizer=optimizer)
    return tmp_path / "ckpt" / "1", model


def test_teacher_becomes_a_file_that_starts_a_network(trained: tuple[Path, toy.Toy], tmp_path: Path) -> None:
    directory, model = trained
    consolidate.main([str(directory), str(tmp_path / "out.pth")])
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(content) == ["teacher"]
    toy.assert_equal(content["teacher"], model.model_ema.state_dict())
    fresh = toy.network(8, 6)
    init_fsdp_model_from_checkpoint(fresh, tmp_path / "out.pth")
    toy.assert_equal(fresh.state_dict(), model.model_ema.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out.pth"]


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_backbone_without_heads_has_bare_names(trained: tuple[Path, toy.Toy], tmp_path: Path, network: str) -> None:
    directory, model = trained
    expected = (model.model_ema if network == "teacher" else model.student)["backbone"].state_dict()
    options = ["--what", "backbone", "--model", network]
    consolidate.main([str(directory), str(tmp_path / "out.pth"), *options])
    toy.assert_equal(torch.load(tmp_path / "out.pth", weights_only=True), expected)
    consolidate.main([str(directory), str(tmp_path / "out.safetensors"), *options])
    toy.assert_equal(load_file(tmp_path / "out.safetensors"), expected)


def test_exported_teacher_is_found_without_a_name(trained: tuple[Path, toy.Toy], tmp_path: Path) -> None:
    model = trained[1].model_ema
    save_checkpoint(tmp_path / "sharded", iteration=1, model=model)
    consolidate.consolidate(tmp_path / "sharded", tmp_path / "out.pth")
    toy.assert_equal(torch.load(tmp_path / "out.pth", weights_only=True)["teacher"], model.state_dict())
    with pytest.raises(CheckpointError, match="has no student"):
        consolidate.consolidate(tmp_path / "sharded", tmp_path / "out.pth", model="student")


def test_checkpoint_that_cannot_be_read_leaves_the_old_file(trained: tuple[Path, toy.Toy], tmp_path: Path) -> None:
    directory, _ = trained
    (tmp_path / "out.pth").write_text("old")
    flip_a_bit(directory)
    with pytest.raises(SystemExit, match="error: .*a different checksum"):
        consolidate.main([str(directory), str(tmp_path / "out.pth")])
    assert (tmp_path / "out.pth").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out.pth"]


def test_inspection_shows_iteration_origin_and_entries(
    trained: tuple[Path, toy.Toy], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, model = trained
    inspect.main([str(directory)])
    shown = capsys.readouterr().out
    assert "iteration   1\n" in shown and f"1 processes, torch {torch.__version__}" in shown and "undamaged" in shown
    n_entries = len(model.student["backbone"].state_dict())
    assert any(line.split()[:2] == ["model.student.backbone", str(n_entries)] for line in shown.splitlines())
    inspect.main([str(directory), "--all"])
    assert "model.model_ema.backbone.periods  [3] float64\n" in capsys.readouterr().out
    (directory / "checkpoint.json").unlink()
    inspect.main([str(directory)])
    assert "no checkpoint.json" in capsys.readouterr().out


def test_inspection_of_a_damaged_checkpoint_fails(trained: tuple[Path, toy.Toy]) -> None:
    flip_a_bit(trained[0])
    with pytest.raises(SystemExit, match="error: .*a different checksum"):
        inspect.main([str(trained[0])])


@pytest.mark.parametrize("command", [lambda path: inspect.main([str(path)]), lambda path: consolidate_to(path)])
def test_what_is_not_a_checkpoint_is_refused_and_the_one_below_it_named(
    trained: tuple[Path, toy.Toy], tmp_path: Path, command: Callable[[Path], None]
) -> None:
    directory, _ = trained
    for given in (directory.parent, directory.parent.parent):
        with pytest.raises(SystemExit, match=rf"{given} is not a checkpoint; the newest one below it is {directory}$"):
            command(given)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"empty is not a checkpoint: it has neither checkpoint.json nor .metadata$"):
        command(empty)
    (tmp_path / "w.pth").touch()
    with pytest.raises(SystemExit, match=r"w.pth is a file; expected the directory of a checkpoint, e.g. RUN/ckpt/9"):
        command(tmp_path / "w.pth")
    with pytest.raises(SystemExit, match="error: .*nowhere does not exist"):
        command(tmp_path / "nowhere")


def consolidate_to(path: Path) -> None:
    consolidate.main([str(path), str(path.parent / "out.pth")])


def test_output_in_a_directory_that_is_not_there_is_named(trained: tuple[Path, toy.Toy], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=rf"error: the directory {tmp_path}/none for out.pth does not exist"):
        consolidate.main([str(trained[0]), str(tmp_path / "none" / "out.pth")])
