"""Models of any size and training, built from what a checkpoint holds, and what is said about what was assumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov3.configs import get_default_config
from dinov3.hub.convert import convert
from dinov3.hub.from_checkpoint import dinov3_from_checkpoint
from dinov3.models import build_model_from_cfg
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer
from dinov3.utils.weight_files import WeightsError

from . import libraries
from .test_foreign_checkpoints import below, convnext, vit

IMAGES = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
#: Of openly licensed models: no bias of queries, keys and values, positions in float32, often SwiGLU.
OPEN = {"qkv_bias": False, "mask_k_bias": False, "norm_layer": "layernormbf16", "n_storage_tokens": 0}


def assert_same_features(model: nn.Module, expected: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), expected(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ffn_layer": "swiglu", "ffn_ratio": 4.0},
        {"ffn_layer": "swiglu64", "embed_dim": 48, "num_heads": 3, "ffn_ratio": 6.0},
        {"layerscale_init": None, "n_storage_tokens": 3},
        {"patch_size": 8, "qkv_bias": True},
        {"qkv_bias": True, "mask_k_bias": True, "ffn_bias": False, "proj_bias": False},
        {"norm_layer": "rmsnorm", "pos_embed_rope_base": 30.0},
        {"untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True},
    ],
)
def test_vit_is_built_from_its_shapes(options: dict[str, Any], tmp_path: Path) -> None:
    expected = libraries.randomise_(vit(**OPEN | options))
    torch.save({"backbone": expected.state_dict(), "head": {"weight": torch.ones(2)}}, tmp_path / "w.pth")
    model = dinov3_from_checkpoint(weights=tmp_path / "w.pth")
    assert isinstance(model, DinoVisionTransformer) and not model.training
    assert model.rope_embed.periods.dtype == torch.float32
    assert_same_features(model, expected)


def test_convnext_is_built_from_its_shapes(tmp_path: Path) -> None:
    expected = libraries.randomise_(convnext())
    state = {name: t for name, t in expected.state_dict().items() if not name.startswith("norms.")}
    torch.save({"state_dict": below("model.backbone.", state)}, tmp_path / "w.ckpt")
    model = dinov3_from_checkpoint(str(tmp_path / "w.ckpt"))
    assert isinstance(model, ConvNeXt)
    assert_same_features(model, expected)


def test_a_state_dict_is_copied() -> None:
    state = vit(**OPEN).state_dict()
    model = dinov3_from_checkpoint(weights=state)
    assert_same_features(model, vit(**OPEN))
    assert model.cls_token.data_ptr() != state["cls_token"].data_ptr()


def without_periods(model: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if n not in ("rope_embed.periods", "mask_token")}


def test_what_was_assumed_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = libraries.randomise_(vit(**OPEN, embed_dim=128))
    torch.save({"backbone": without_periods(expected)}, tmp_path / "w.pth")
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        model = dinov3_from_checkpoint(weights=tmp_path / "w.pth")
    assert_same_features(model, expected)
    assert (
        "assumed layer_norm_eps=1e-05, pos_embed_rope_normalize_coords=separate, num_heads=2, "
        "pos_embed_rope_base=100.0 as in the published models" in caplog.text
    )


def test_settings_beside_the_weights_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"num_heads": 4, "pos_embed_rope_base": 30.0, "pos_embed_rope_normalize_coords": "max"}
    expected = libraries.randomise_(vit(**OPEN | settings | {"norm_layer": "layernorm"}))
    config = {"model": settings | {"norm_layer": "layernorm", "drop_path_rate": 0.3}, "optim": {"lr": 1e-3}}
    torch.save({"backbone": without_periods(expected), "config": config}, tmp_path / "w.pth")
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        model = dinov3_from_checkpoint(weights=tmp_path / "w.pth")
    assert_same_features(model, expected)
    assert not caplog.text
    assert model.norm.eps == 1e-6 and model.rope_embed.normalize_coords == "max" and model.num_heads == 4


def test_words_of_other_trainers_are_not_settings(tmp_path: Path) -> None:
    expected = vit(**OPEN)
    config = {"norm_layer": "LayerNorm", "pos_embed_rope_dtype": "float32", "num_heads": [2, 4], "layer_norm_eps": None}
    torch.save({"backbone": expected.state_dict(), "args": config}, tmp_path / "w.pth")
    assert_same_features(dinov3_from_checkpoint(weights=tmp_path / "w.pth"), expected)


def test_settings_that_contradict_each_other_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = without_periods(vit(**OPEN, embed_dim=128))
    config = {"student": {"num_heads": 4}, "teacher": {"num_heads": 8}}
    torch.save({"backbone": state, "config": config}, tmp_path / "w.pth")
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        assert dinov3_from_checkpoint(weights=tmp_path / "w.pth").num_heads == 2
    assert "num_heads=2" in caplog.text


@pytest.mark.parametrize("kind", ["transformers_vit", "transformers_convnext"])
def test_directory_of_transformers(kind: str, tmp_path: Path) -> None:
    options = {"rope_theta": 30.0, "layer_norm_eps": 1e-3} if kind == "transformers_vit" else {}
    theirs = getattr(libraries, kind)(**options)
    theirs.save_pretrained(tmp_path)
    model = dinov3_from_checkpoint(weights=tmp_path)
    with torch.no_grad():
        tokens = model.forward_features(IMAGES)
        expected = theirs(IMAGES).last_hidden_state
    libraries.assert_near(tokens["x_norm_clstoken"], expected[:, 0])


def test_directory_of_timm(tmp_path: Path) -> None:
    theirs = libraries.timm_vit(bias=False)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    arguments = {"num_heads": libraries.HEADS, "rope_temperature": 100.0}
    config = {"architecture": "vit_small_patch16_dinov3", "num_features": libraries.DIM, "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        libraries.assert_near(dinov3_from_checkpoint(weights=tmp_path)(IMAGES), theirs(IMAGES))


@pytest.mark.parametrize("place", [".", "eval", "eval/training_4", "eval/training_4/teacher_checkpoint.pth"])
def test_a_training_run_and_what_lies_in_it(place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny = {"arch": "vit_tiny", "depth": 1, "norm_layer": "layernorm", "pos_embed_rope_normalize_coords": "min"}
    cfg = OmegaConf.merge(get_default_config(), {"student": tiny})
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    expected, _ = build_model_from_cfg(cfg, only_teacher=True)
    expected = libraries.randomise_(expected.to_empty(device="cpu")).eval()
    expected.rope_embed._init_weights()
    (tmp_path / "eval" / "training_4").mkdir(parents=True)
    teacher = {"teacher": below("backbone.", expected.state_dict())}
    torch.save(teacher, tmp_path / "eval" / "training_4" / "teacher_checkpoint.pth")
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        model = dinov3_from_checkpoint(weights=tmp_path / place)
        convert(tmp_path / place, tmp_path / "plain.pth", to="release")
    assert model.norm.eps == 1e-6 and model.rope_embed.normalize_coords == "min"
    assert_same_features(model, expected)
    assert not caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "does not hold a DINOv3 backbone: it has epoch; looked for a ViT"),
        ({"state_dict": {"net.layer1.0.conv1.weight": torch.ones(1)}}, "backbone: it is a ResNet"),
        (
            lambda: {"backbone": {n: t for n, t in vit().state_dict().items() if "mlp.fc2" not in n}},
            r"does not hold a complete DINOv3 backbone: .*4 missing \(blocks.0.mlp.fc2.weight, ",
        ),
        (
            lambda: {"model": vit().state_dict() | {"pos_embed": torch.ones(1, 5, 32)}},
            "it is a DINOv2 model, or another ViT with learned positions",
        ),
        (lambda: {"model": vit().state_dict(), "ema": vit(1).state_dict()}, "holds 2 backbones, 'ema' and 'model'"),
    ],
)
def test_what_is_not_one_complete_backbone(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content() if callable(content) else content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        dinov3_from_checkpoint(weights=tmp_path / "w.pth")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at .*none\.pth"):
        dinov3_from_checkpoint(weights=tmp_path / "none.pth")
