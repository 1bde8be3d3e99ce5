"""Golden case of the entries of a training checkpoint and of an exported teacher."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint import FileSystemReader

from dinov3.checkpointer import load_checkpoint, read_tensors, save_checkpoint
from dinov3.configs import get_default_config
from dinov3.distributed import runtime
from dinov3.train.saving import export_teacher
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.train.train import build_model

from . import golden

CASE = golden.case("trainer", "dcp-layout")
#: The case's configuration; the number of prototypes, on which no count depends, fits a test.
CONFIG = {
    "compute_precision": {"param_dtype": "fp32"},
    "student": {"arch": "vit_small", "patch_size": 16, "n_storage_tokens": 2},
    "dino": {"head_n_prototypes": 24},
    "ibot": {"head_n_prototypes": 24, "separate_head": True},
    "optim": {"layerwise_decay": 0.9, "multi_tensor_optim": True},
    "train": {"compile": False, "checkpointing": False},
}


def build_on_cpu() -> tuple[SSLMetaArch, torch.optim.Optimizer]:
    model = build_model(OmegaConf.merge(get_default_config(), CONFIG)).train()
    model.init_weights()
    optimizer = torch.optim.AdamW(model.get_params_groups())
    return model, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, SSLMetaArch, torch.optim.Optimizer]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(runtime.DEVICE_VARIABLE, "cpu")
        model, optimizer = build_on_cpu()
        for parameter in model.student.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        root = tmp_path_factory.mktemp("run")
        save_checkpoint(root / "ckpt" / "1", iteration=1, model=model, optimizer=optimizer)
        yield root, model, optimizer


def pattern_of(layout: str) -> re.Pattern[str]:
    return re.compile(re.escape(layout).replace(r"\*", ".+").replace("<i>", r"[0-9]+"))


def count(keys: Iterable[str], layouts: Iterable[str]) -> dict[str, int]:
    """How many of `keys` are of each layout; every key must be of exactly one."""
    counts: Counter[str] = Counter()
    patterns = {layout: pattern_of(layout) for layout in layouts}
    for key in keys:
        (layout,) = [layout for layout, pattern in patterns.items() if pattern.fullmatch(key)]
        counts[layout] += 1
    return dict(counts)


def test_entries_of_a_checkpoint(saved: tuple[Path, Any, Any]) -> None:
    expected = dict(CASE["expect"])
    # The same module under a second name, which the case says need not be written.
    duplicate = [layout for layout in expected if layout.startswith("model.teacher.")]
    assert len(duplicate) == 3
    for layout in duplicate:
        del expected[layout]
    # One value, not a count.
    del expected["iteration"]
    entries = FileSystemReader(saved[0] / "ckpt" / "1").read_metadata().state_dict_metadata
    assert count(set(entries) - {"iteration"}, expected) == expected
    assert "iteration" in entries


def test_loss_centers_are_whole_float32_rows(saved: tuple[Path, Any, Any]) -> None:
    tensors = read_tensors(saved[0] / "ckpt" / "1", "model.")
    assert set(CASE["shapes"]) == {"model.dino_loss.center", "model.ibot_patch_loss.center"}
    for key, text in CASE["shapes"].items():
        shape, dtype = text.replace("head_n_prototypes", "24").rsplit(" ", 1)
        center = tensors[key.removeprefix("model.")]
        assert " x ".join(str(size) for size in center.shape) == shape and str(center.dtype) == f"torch.{dtype}"


def test_entries_of_the_exported_teacher(saved: tuple[Path, SSLMetaArch, Any]) -> None:
    root, model, _ = saved
    expected = CASE["teacher_checkpoint"]
    path = export_teacher(model, root, 1)
    assert str(path.relative_to(root)) == expected["file"].replace("<iteration>", "1")
    content = torch.load(path, weights_only=True)
    assert list(content) == expected["top"]
    assert count(content["teacher"], expected["keys"]) == expected["keys"]


def test_checkpoint_with_the_official_duplicate_of_the_teacher_loads(
    saved: tuple[Path, SSLMetaArch, torch.optim.Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(runtime.DEVICE_VARIABLE, "cpu")
    _, model, optimizer = saved
    model._modules["teacher"] = model.model_ema
    try:
        save_checkpoint(tmp_path / "7", iteration=7, model=model, optimizer=optimizer)
    finally:
        del model._modules["teacher"]
    (tmp_path / "7" / "checkpoint.json").unlink()  # the official release writes none
    entries = FileSystemReader(tmp_path / "7").read_metadata().state_dict_metadata
    prefixes = [layout for layout in CASE["expect"] if layout.startswith("model.")]
    assert count([key for key in entries if key.startswith("model.")], prefixes) == {
        prefix: CASE["expect"][prefix] for prefix in prefixes
    }

    other, other_optimizer = build_on_cpu()
    assert load_checkpoint(tmp_path / "7", model=other, optimizer=other_optimizer) == 7
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
