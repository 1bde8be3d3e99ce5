"""Checkpoints of other trainers: the backbone in them is found, the rest is left out, nothing is guessed."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov3.hub import backbones
from dinov3.hub.convert import convert
from dinov3.hub.weights import find_backbones, load_backbone_, read_state_dict
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer
from dinov3.utils.weight_files import WeightsError

from . import libraries

State = dict[str, Tensor]


def vit(seed: int = 0, **options: Any) -> DinoVisionTransformer:
    torch.manual_seed(seed)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "n_storage_tokens": 2, "layerscale_init": 1e-5}
    model = DinoVisionTransformer(**sizes | {"mask_k_bias": True, "pos_embed_rope_dtype": "fp32"} | options)
    model.init_weights()
    return model.eval()


def convnext(seed: int = 0) -> ConvNeXt:
    torch.manual_seed(seed)
    model = ConvNeXt(depths=[1, 1, 1, 1], dims=[8, 16, 16, 32])
    model.init_weights()
    return model.eval()


def below(prefix: str, state: State, **others: Any) -> dict[str, Any]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()} | others


HEADS = {
    "head.weight": torch.ones(2),
    "fc.bias": torch.ones(2),
    "projector.0.weight": torch.ones(2),
    "decoder.blocks.0.norm1.weight": torch.ones(2),
    "decoder_embed.weight": torch.ones(2),
    "linear_head.weight": torch.ones(2),
    "dino_head.last_layer.weight": torch.ones(2),
}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
FORMS: dict[str, Callable[[State], dict[str, Any]]] = {
    "heads on top": lambda s: s | HEADS,
    "model": lambda s: {"model": s, "optimizer": OPTIMIZER, "epoch": 3},
    "state_dict": lambda s: {"state_dict": s | HEADS, "scaler": {"scale": 1.0}},
    "backbone": lambda s: {"backbone": s},
    "teacher": lambda s: {"student": below("module.backbone.", s), "teacher": below("backbone.", s) | HEADS},
    "ddp": lambda s: below("module.", s) | {"module.head.weight": torch.ones(2)},
    "compiled": lambda s: below("_orig_mod.", s),
    "compiled in ddp": lambda s: {"model": below("module._orig_mod.", s)},
    "compiled inside": lambda s: below("model.backbone._orig_mod.", s),
    "compiled blocks": lambda s: {name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in s.items()},
    "any order": lambda s: {"state_dict": below("encoder.model._orig_mod.backbone.module.", s)},
    "lightning": lambda s: {
        "state_dict": below("model.backbone.", s) | below("model.", HEADS) | {"criterion.center": torch.ones(2)},
        "pytorch-lightning_version": "2.5",
        "optimizer_states": [OPTIMIZER],
        "hyper_parameters": {"lr": 1e-3},
    },
    "settings": lambda s: {"model": s, "args": argparse.Namespace(lr=1e-3, output=Path("a"), best=np.float64(0.5))},
}


@pytest.mark.parametrize("make", [vit, convnext])
@pytest.mark.parametrize("form", FORMS)
def test_backbone_is_found_below_any_keys_and_prefixes(form: str, make: Any, tmp_path: Path) -> None:
    state = make().state_dict()
    torch.save(FORMS[form](state), tmp_path / "w.pth")
    found = read_state_dict(tmp_path / "w.pth")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_what_is_left_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(FORMS["lightning"](vit().state_dict()), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, logger="dinov3"):
        read_state_dict(tmp_path / "w.pth")
    assert "took 'state_dict.model.backbone', left out state_dict.model.head, state_dict.model.fc, " in caplog.text
    assert "state_dict.criterion, pytorch-lightning_version, optimizer_states, hyper_parameters" in caplog.text


def test_objects_beside_the_weights_are_not_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(FORMS["settings"](vit().state_dict()), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, logger="dinov3"):
        read_state_dict(tmp_path / "w.pth")
    assert "did not load its Python objects (argparse.Namespace, " in caplog.text


def test_model_that_was_saved_as_a_whole(tmp_path: Path) -> None:
    model = nn.ModuleDict({"backbone": vit(), "head": nn.Linear(2, 2)})
    torch.save(model, tmp_path / "w.pth")
    found = read_state_dict(tmp_path / "w.pth")
    expected = vit().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_half_precision_gives_the_parameters_of_the_model(tmp_path: Path) -> None:
    state = vit().state_dict()
    torch.save({"model": {name: tensor.half() for name, tensor in state.items()}}, tmp_path / "w.pth")
    model = load_backbone_(vit(seed=1), tmp_path / "w.pth")
    assert all(torch.equal(t, state[name].half().float()) for name, t in model.state_dict().items())


def test_two_backbones_are_not_guessed_between(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    ema = vit(seed=1).state_dict()
    torch.save({"state_dict": vit().state_dict(), "state_dict_ema": ema | HEADS}, path)
    with pytest.raises(WeightsError) as caught:
        read_state_dict(path)
    assert f"{path} holds 2 backbones, 'state_dict' and 'state_dict_ema': write the one" in str(caught.value)
    advice = f"torch.save(dinov3.hub.weights.find_backbones({str(path)!r})['state_dict_ema'], 'backbone.pth')"
    assert advice in str(caught.value)
    assert find_backbones(path)["state_dict_ema"].keys() == ema.keys()


def test_two_copies_of_the_same_backbone_are_one(tmp_path: Path) -> None:
    state = vit().state_dict()
    torch.save({"state_dict": below("backbone.", state) | below("model.backbone.", state)}, tmp_path / "w.pth")
    assert read_state_dict(tmp_path / "w.pth").keys() == state.keys()


def test_the_backbone_of_the_size_of_the_model_is_meant(tmp_path: Path) -> None:
    state, wide = vit().state_dict(), vit(embed_dim=64).state_dict()
    torch.save({"teacher": wide, "student": state}, tmp_path / "w.pth")
    for like, expected in ((vit(1), state), (vit(1, embed_dim=64), wide)):
        model = load_backbone_(like, tmp_path / "w.pth")
        assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())


def test_names_that_only_differ_in_wrappers_are_refused(tmp_path: Path) -> None:
    state, other = vit().state_dict(), vit(seed=1).state_dict()
    torch.save(state | below("module.", other), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"holds cls_token twice, once as module\.cls_token"):
        read_state_dict(tmp_path / "w.pth")


def test_adapters_have_to_be_merged_first(tmp_path: Path) -> None:
    adapter = {"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(4, 32)}
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save(adapter | below("base_model.model.", vit().state_dict()), tmp_path / "trained.pth")
    for path in (tmp_path, tmp_path / "trained.pth"):
        with pytest.raises(
            WeightsError, match=r"holds an adapter .*merge it first.*\.merge_and_unload\(\); torch.save"
        ):
            read_state_dict(path)


def test_unknown_entries_of_a_backbone_are_still_an_error(tmp_path: Path) -> None:
    torch.save({"model": vit().state_dict() | {"pos_embed": torch.ones(1, 5, 32)}}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="another ViT with learned positions"):
        load_backbone_(vit(), tmp_path / "w.pth")


def test_optional_entries_are_filled_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = vit(pos_embed_rope_base=10.0)
    state = {n: t for n, t in expected.state_dict().items() if n not in ("mask_token", "rope_embed.periods")}
    torch.save(state, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, logger="dinov3"):
        model = load_backbone_(vit(seed=1, pos_embed_rope_base=10.0), tmp_path / "w.pth")
    assert all(torch.equal(t, expected.state_dict()[name]) for name, t in model.state_dict().items())
    assert "lacks mask_token, rope_embed.periods" in caplog.text


@pytest.mark.parametrize("kind", ["transformers_vit", "timm_vit", "transformers_convnext", "timm_convnext"])
@pytest.mark.parametrize("prefix", ["", "model.backbone.", "module.encoder._orig_mod."])
def test_models_of_other_libraries_in_other_trainers(kind: str, prefix: str, tmp_path: Path) -> None:
    theirs = getattr(libraries, kind)()
    torch.save(theirs.state_dict(), tmp_path / "plain.pth")
    expected = read_state_dict(tmp_path / "plain.pth")
    torch.save({"state_dict": below(prefix, theirs.state_dict()) | {"fc.weight": torch.ones(2)}}, tmp_path / "w.pth")
    found = read_state_dict(tmp_path / "w.pth")
    assert "cls_token" in found or "downsample_layers.0.0.weight" in found
    libraries.assert_bits_equal(found, expected)


@pytest.mark.parametrize("place", [".", "eval", "eval/training_9"])
def test_entries_take_a_training_run(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.make_entries_small(monkeypatch)
    state = backbones.dinov3_vits16(pretrained=False).state_dict()
    (tmp_path / "config.yaml").write_text("student: {}\ncrops: {}\n")
    (tmp_path / "eval" / "training_9").mkdir(parents=True)
    torch.save({"teacher": state}, tmp_path / "eval" / "training_9" / "teacher_checkpoint.pth")
    model = backbones.dinov3_vits16(weights=tmp_path / place)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_entries_and_convert_take_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.make_entries_small(monkeypatch)
    state = backbones.dinov3_vits16(pretrained=False).state_dict()
    torch.save(FORMS["lightning"](state), tmp_path / "w.pth")
    for weights in (tmp_path / "w.pth", torch.load(tmp_path / "w.pth")):
        model = backbones.dinov3_vits16(weights=weights)
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    convert(tmp_path / "w.pth", tmp_path / "plain.pth", to="release")
    written = torch.load(tmp_path / "plain.pth")
    assert written.keys() == state.keys() and all(torch.equal(written[name], t) for name, t in state.items())
