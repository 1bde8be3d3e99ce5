"""Backbones from the output directory of a training run, and for evaluations."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dinov3.checkpointer import save_checkpoint
from dinov3.configs import get_default_config
from dinov3.distributed import runtime
from dinov3.hub.runs import build_model_for_eval, dinov3_from_run
from dinov3.models import build_model_from_cfg
from dinov3.utils.weight_files import WeightsError

TINY = {
    "arch": "vit_tiny",
    "depth": 1,
    "n_storage_tokens": 1,
    "mask_k_bias": True,
    "qkv_bias": True,
    "layerscale": 1e-5,
}
IMAGES = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.DEVICE_VARIABLE, "cpu")


def config(**student: Any) -> DictConfig:
    merged = OmegaConf.merge(get_default_config(), {"student": TINY | student})
    assert isinstance(merged, DictConfig)
    return merged


def backbone(seed: int, cfg: DictConfig | None = None) -> nn.Module:
    torch.manual_seed(seed)
    model, _ = build_model_from_cfg(cfg or config(), only_teacher=True)
    model.to_empty(device="cpu")
    model.init_weights()
    return model.eval()


def with_heads(seed: int) -> nn.ModuleDict:
    return nn.ModuleDict({"backbone": backbone(seed), "dino_head": nn.Linear(2, 2), "ibot_head": nn.Linear(2, 2)})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    OmegaConf.save(config(), tmp_path / "config.yaml")
    return tmp_path


def save_file(run: Path, iteration: int, seed: int) -> Path:
    path = run / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"teacher": with_heads(seed).state_dict()}, path)
    return path


def save_sharded(run: Path, iteration: int, seed: int) -> Path:
    path = run / "eval" / f"training_{iteration}" / "sharded_teacher_checkpoint"
    save_checkpoint(path, iteration=iteration, model=with_heads(seed))
    return path


def save_training(run: Path, iteration: int, seed: int, teacher: str = "model_ema") -> Path:
    path = run / "ckpt" / str(iteration)
    save_checkpoint(
        path, iteration=iteration, model=nn.ModuleDict({teacher: with_heads(seed), "student": with_heads(99)})
    )
    return path


SAVE = {"file": save_file, "sharded": save_sharded, "training": save_training}


def assert_equal(model: nn.Module, want: nn.Module) -> None:
    state: dict[str, Tensor] = model.state_dict()
    assert state.keys() == want.state_dict().keys()
    for name, tensor in want.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


@pytest.mark.parametrize("form", SAVE)
def test_teacher_is_found_in_every_form(form: str, run: Path) -> None:
    SAVE[form](run, 4, seed=1)
    model = dinov3_from_run(str(run))
    assert_equal(model, backbone(1))
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(IMAGES), backbone(1)(IMAGES))


def test_checkpoint_of_the_release_names_the_teacher_otherwise(run: Path) -> None:
    save_training(run, 4, seed=1, teacher="teacher")
    assert_equal(dinov3_from_run(run), backbone(1))


@pytest.mark.parametrize("newest", SAVE)
def test_newest_iteration_wins_by_number(newest: str, run: Path) -> None:
    for form, save in SAVE.items():
        save(run, 10 if form == newest else 9, seed=1 if form == newest else 2)
    (run / "ckpt" / ".tmp-11-ab").mkdir(exist_ok=True, parents=True)
    (run / "ckpt" / "12.corrupt").mkdir()
    (run / "ckpt" / "13").mkdir()
    assert_equal(dinov3_from_run(run), backbone(1))


def test_iteration_can_be_chosen(run: Path) -> None:
    save_file(run, 3, seed=1)
    save_training(run, 7, seed=2)
    assert_equal(dinov3_from_run(run, iteration=3), backbone(1))
    with pytest.raises(FileNotFoundError, match=rf"{run} has no teacher of iteration 5; it has \[3, 7\]"):
        dinov3_from_run(run, iteration=5)


def test_a_teacher_file_beside_the_configuration_is_enough(run: Path) -> None:
    save_file(run, 3, seed=1).rename(run / "teacher_checkpoint.pth")
    assert_equal(dinov3_from_run(run), backbone(1))


def test_rope_is_computed_in_the_dtype_of_the_configuration(run: Path) -> None:
    save_file(run, 3, seed=1)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        OmegaConf.save(config(pos_embed_rope_dtype=name), run / "config.yaml")
        model = dinov3_from_run(run)
        assert model.rope_embed.periods.dtype == model.rope_embed.dtype == dtype


def test_missing_parts_of_a_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no training run at {tmp_path / 'none'}"):
        dinov3_from_run(tmp_path / "none")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="it has no config.yaml; it holds notes.txt"):
        dinov3_from_run(tmp_path)
    OmegaConf.save(config(), tmp_path / "config.yaml")
    with pytest.raises(FileNotFoundError, match="has not saved a teacher yet: .* it holds config.yaml, notes.txt"):
        dinov3_from_run(tmp_path)
    OmegaConf.save({"model": {}}, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="not the configuration of a training: it has no section student and no crops"):
        dinov3_from_run(tmp_path)


def test_teacher_that_does_not_fit_its_configuration(run: Path) -> None:
    save_file(run, 3, seed=1)
    OmegaConf.save(config(arch="vit_small"), run / "config.yaml")
    with pytest.raises(
        WeightsError, match=r"does not fit student.arch=vit_small .* it is a ViT with 192 channels and 1 blocks"
    ):
        dinov3_from_run(run)


def test_ratio_that_building_used_to_ignore(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(run, 3, seed=1)
    OmegaConf.save(config(ffn_ratio=6.0), run / "config.yaml")
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        assert_equal(dinov3_from_run(run), backbone(1))
    assert "has the FFN of vit_tiny, not student.ffn_ratio=6.0" in caplog.text


@pytest.mark.parametrize("weights", [None, ""])
def test_evaluation_without_weights_starts_at_random(weights: str | None) -> None:
    torch.manual_seed(1)
    model = build_model_for_eval(config(), weights)
    assert_equal(model, backbone(1))
    assert not model.training and model(IMAGES).isfinite().all()


@pytest.mark.parametrize("form", [*SAVE, "run"])
def test_evaluation_takes_a_file_a_checkpoint_or_a_run(form: str, run: Path) -> None:
    path = SAVE["training" if form == "run" else form](run, 4, seed=1)
    model = build_model_for_eval(config(), run if form == "run" else str(path))
    assert_equal(model, backbone(1))
    assert not any(module.training for module in model.modules())


def test_evaluation_is_strict(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights at none.pth"):
        build_model_for_eval(config(), "none.pth")
    state = backbone(1).state_dict()
    del state["cls_token"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 missing \(cls_token\)"):
        build_model_for_eval(config(), tmp_path / "w.pth")


def test_sharding_leaves_one_process_as_it_is(run: Path) -> None:
    path = save_file(run, 4, seed=1)
    cfg = config()
    cfg.compute_precision.param_dtype = "fp32"
    cfg.train.compile = False
    assert_equal(build_model_for_eval(cfg, path, shard_unsharded_model=True), backbone(1))
