"""The entries of a backbone in files and directories of every form, and what is said where there are none."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dinov3.hub.weights import read_state_dict
from dinov3.utils.weight_files import WeightsError

STATE = {"cls_token": torch.randn(1, 1, 8), "blocks.0.attn.backbone.weight": torch.randn(300, 8)}


def assert_holds_state(state: dict[str, Tensor]) -> None:
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in STATE.items()}


HEADS = {"dino_head.mlp.0.weight": torch.ones(2), "ibot_head.last_layer.weight": torch.ones(2)}
FORMS: dict[str, dict[str, Any]] = {
    "plain": STATE,
    "plain with heads": STATE | HEADS,
    "module": prefixed("module."),
    "backbone": prefixed("backbone.") | HEADS,
    "module backbone": prefixed("module.backbone.") | HEADS,
    "backbone module": prefixed("backbone.module."),
    "teacher": {"teacher": prefixed("backbone.") | HEADS, "iteration": 3},
    "teacher module": {"teacher": prefixed("module.backbone."), "student": prefixed("module.backbone.")},
    "other heads": prefixed("backbone.") | {"linear_head.weight": torch.ones(2)},
}


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
def test_prefixes_go_at_the_start_of_a_name_only(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    assert_holds_state(read_state_dict(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "does not hold a DINOv3 backbone: it is empty; looked for a ViT"),
        (HEADS, r"does not hold a DINOv3 backbone: it has dino_head.mlp.0.weight, ibot_head.last_layer.weight;"),
        (
            {"state_dict": {"a.weight": torch.ones(1)}, "epoch": 3},
            "backbone: it has state_dict.a.weight, epoch; looked",
        ),
        (
            {"model": {"transformer.decoder.norm.weight": torch.ones(1)}},
            "backbone: these are the weights of a detector",
        ),
        ({"state_dict": {"net.layer1.0.conv1.weight": torch.ones(1)}}, "backbone: it is a ResNet"),
    ],
)
def test_content_that_is_not_a_state_dict(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=message):
        read_state_dict(tmp_path / "weights.pth")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory of a distributed checkpoint with the backbone's entries of a teacher."""
    entries = {f"model.teacher.backbone.{name}": tensor for name, tensor in STATE.items()}
    others = {"model.student.backbone.cls_token": torch.zeros(1), "model.teacher.dino_head.bias": torch.zeros(1)}
    dcp.save(entries | others | {"iteration": 3}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    return tmp_path / "checkpoint"


def test_distributed_checkpoint(checkpoint: Path) -> None:
    assert_holds_state(read_state_dict(checkpoint))


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_the_index_of_a_distributed_checkpoint_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(WeightsError, match=r"\.metadata is not the index .*: it refers to \S+\.mkdir, which could run"):
        read_state_dict(checkpoint)
    assert not (tmp_path / "sprung").exists()


def test_damaged_distributed_checkpoints(checkpoint: Path) -> None:
    index = (checkpoint / ".metadata").read_bytes()
    (checkpoint / ".metadata").write_bytes(index[:100])
    with pytest.raises(WeightsError, match=r"\.metadata is not the index of a distributed checkpoint, or is damaged"):
        read_state_dict(checkpoint)
    (checkpoint / ".metadata").write_bytes(index)
    next(checkpoint.glob("*.distcp")).unlink()
    with pytest.raises(WeightsError, match=str(checkpoint)):
        read_state_dict(checkpoint)


def test_distributed_checkpoint_without_a_teacher(tmp_path: Path) -> None:
    dcp.save({"model.student.backbone.cls_token": torch.zeros(1)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(
        WeightsError, match="does not hold a teacher: no entry starts with any of model.teacher.backbone., "
    ):
        read_state_dict(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no weights at {tmp_path / 'none.pth'}"):
        read_state_dict(tmp_path / "none.pth")


def test_directories_that_are_not_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match="neither a distributed checkpoint .* nor a model of transformers or timm .* holds nothing"
    ):
        read_state_dict(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(
        WeightsError, match="nor a training run .*config.yaml, and some of eval/training_.*holds config.yaml"
    ):
        read_state_dict(tmp_path)
