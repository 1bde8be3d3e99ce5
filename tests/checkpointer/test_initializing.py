"""Starting a network with the weights of a file or of a checkpoint directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dinov3.checkpointer import (
    CheckpointError,
    init_fsdp_model_from_checkpoint,
    read_tensors,
    save_checkpoint,
)

from . import toy


@pytest.fixture
def teacher() -> nn.ModuleDict:
    torch.manual_seed(0)
    return toy.network(8, 6)


@pytest.fixture
def fresh() -> nn.ModuleDict:
    torch.manual_seed(1)
    return toy.network(8, 6)


def write(directory: Path, kind: str, teacher: nn.ModuleDict) -> Path:
    state = teacher.state_dict()
    path = directory / {"training": "9", "exported": "sharded_teacher_checkpoint", "safetensors": "w.safetensors"}.get(
        kind, "w.pth"
    )
    if kind == "training":
        model = toy.make(seed=5)[0]
        model.model_ema = teacher
        save_checkpoint(path, iteration=9, model=model)
    elif kind == "exported":
        save_checkpoint(path, iteration=9, model=teacher)
    elif kind == "safetensors":
        save_file(state, path)
    elif kind == "old format":
        torch.save({"teacher": state}, path, _use_new_zipfile_serialization=False)
    elif kind == "module prefix":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    elif kind == "trainer":
        optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}}
        names = {key.replace("backbone.", "backbone._orig_mod."): value for key, value in state.items()}
        torch.save({"model": names | {"criterion.center": torch.ones(2)}, "optimizer": optimizer}, path)
    elif kind == "teacher and student":
        torch.save({"student": {key: torch.zeros_like(value) for key, value in state.items()}, "teacher": state}, path)
    else:
        torch.save({"teacher": state, "iteration": 9} if kind == "teacher" else state, path)
    return path


KINDS = [
    "teacher",
    "bare",
    "safetensors",
    "old format",
    "module prefix",
    "trainer",
    "teacher and student",
    "training",
    "exported",
]


@pytest.mark.parametrize("kind", KINDS)
def test_network_takes_every_form_of_checkpoint(
    tmp_path: Path, kind: str, teacher: nn.ModuleDict, fresh: nn.ModuleDict
) -> None:
    path = write(tmp_path, kind, teacher)
    init_fsdp_model_from_checkpoint(fresh, path)
    toy.assert_equal(fresh.state_dict(), teacher.state_dict())


def test_bare_backbone_starts_a_network_whose_heads_keep_their_values(
    tmp_path: Path, teacher: nn.ModuleDict, fresh: nn.ModuleDict
) -> None:
    torch.save(teacher["backbone"].state_dict(), tmp_path / "w.pth")
    head = {name: value.clone() for name, value in fresh["dino_head"].state_dict().items()}
    with pytest.raises(CheckpointError, match="2 missing: dino_head.weight, dino_head.bias"):
        init_fsdp_model_from_checkpoint(fresh, tmp_path / "w.pth")
    init_fsdp_model_from_checkpoint(fresh, tmp_path / "w.pth", skip_load_keys=["dino_head"])
    toy.assert_equal(fresh["backbone"].state_dict(), teacher["backbone"].state_dict())
    toy.assert_equal(fresh["dino_head"].state_dict(), head)


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_entries_are_ignored_on_both_sides(
    tmp_path: Path, kind: str, teacher: nn.ModuleDict, fresh: nn.ModuleDict
) -> None:
    path = write(tmp_path, kind, teacher)
    fresh["dino_head"] = nn.Linear(8, 30)
    init_fsdp_model_from_checkpoint(fresh, path, skip_load_keys=["dino_head"])
    toy.assert_equal(fresh["backbone"].state_dict(), teacher["backbone"].state_dict())


@pytest.mark.parametrize("kind", ["teacher", "training"])
def test_other_architecture_changes_nothing(tmp_path: Path, kind: str, teacher: nn.ModuleDict) -> None:
    path = write(tmp_path, kind, teacher)
    wider = toy.network(16, 6)
    before = {name: value.clone() for name, value in wider.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"backbone\.norm\.weight: saved \[8\], here \[16\]"):
        init_fsdp_model_from_checkpoint(wider, path)
    toy.assert_equal(wider.state_dict(), before)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 truncated"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_file_is_named(tmp_path: Path, content: bytes, suffix: str, fresh: nn.ModuleDict) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"w{suffix} is (empty|not a checkpoint|truncated)"):
        init_fsdp_model_from_checkpoint(fresh, path)


def test_file_without_a_state_dict_is_refused(tmp_path: Path, fresh: nn.ModuleDict) -> None:
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds a list, expected a state dict"):
        init_fsdp_model_from_checkpoint(fresh, tmp_path / "w.pth")


def test_file_that_is_not_there_is_named(tmp_path: Path, fresh: nn.ModuleDict) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        init_fsdp_model_from_checkpoint(fresh, tmp_path / "nowhere.pth")


def test_single_entries_are_read_without_a_model(tmp_path: Path, teacher: nn.ModuleDict) -> None:
    path = write(tmp_path, "training", teacher)
    tensors = read_tensors(path, "model.model_ema.backbone.")
    toy.assert_equal(tensors, teacher["backbone"].state_dict())
    assert tensors["periods"].dtype == torch.float64
    assert list(read_tensors(path, "model.center")) == [""] and read_tensors(path, "model.absent.") == {}
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        read_tensors(tmp_path)
    toy.data_file(path).unlink()
    with pytest.raises(CheckpointError, match=r"9: .*distcp"):
        read_tensors(path, "model.model_ema.")
