"""Structure, state dicts and addresses of the published backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinov3.hub import backbones
from dinov3.hub.backbones import Weights
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer

from . import golden
from .state_dicts import assert_matches_manifest

FACTS = golden.area("backbones")["facts"]
BACKBONES = list(FACTS["hub_entries"])


def build_on_meta(entry: str, data: str) -> DinoVisionTransformer | ConvNeXt:
    with torch.device("meta"):
        return getattr(backbones, entry)(pretrained=False, weights=Weights[data])


def describe(model: DinoVisionTransformer | ConvNeXt) -> dict[str, Any]:
    described = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_dict_entries": len(model.state_dict()),
    }
    if isinstance(model, ConvNeXt):
        return described
    block, rope = model.blocks[0], model.rope_embed
    first_linear = block.mlp.fc1 if hasattr(block.mlp, "fc1") else block.mlp.w1
    return described | {
        "ffn_hidden": first_linear.out_features,
        "ffn": type(block.mlp).__name__,
        "norm_eps": model.norm.eps,
        "qkv_bias": block.attn.qkv.bias is not None,
        "has_bias_mask": hasattr(block.attn.qkv, "bias_mask"),
        "local_cls_norm": isinstance(model.local_cls_norm, nn.Module),
        "cls_norm": isinstance(model.cls_norm, nn.Module),
        "rope_dtype": str(rope.dtype).removeprefix("torch."),
        "rope_rescale": rope.rescale_coords,
        "rope_base": rope.base,
        "rope_normalize": rope.normalize_coords,
    }


@pytest.mark.parametrize("key", BACKBONES)
def test_structure_and_state_dict(key: str) -> None:
    entry, data = key.split(":")
    model = build_on_meta(entry, data)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training
    want = FACTS["hub_entries"][key]
    described = describe(model)
    got = {name: described[name] if name in described else getattr(model, name) for name in want}
    assert got == want
    assert_matches_manifest(model, entry + ("" if data == "LVD1689M" else f"_{data.lower()}"))


@pytest.mark.parametrize("key", [key for key in FACTS["hub_urls"] if key in BACKBONES])
def test_address(key: str) -> None:
    entry, data = key.split(":")
    assert backbones.url_of(entry, Weights[data]) == FACTS["hub_urls"][key]


@pytest.mark.parametrize("entry", sorted({key.split(":")[0] for key in BACKBONES}))
def test_weights_that_were_not_published_are_refused(entry: str) -> None:
    if f"{entry}:SAT493M" in FACTS["hub_urls"]:
        assert backbones.url_of(entry, Weights.SAT493M)
        return
    with pytest.raises(ValueError, match=f"{entry} was not published with weights SAT493M, only with LVD1689M"):
        getattr(backbones, entry)(weights=Weights.SAT493M)


@pytest.mark.parametrize(("path", "expected"), FACTS["hub_paths"]["is_url"].items())
def test_is_url(path: str, expected: bool) -> None:
    assert backbones.is_url(path) is expected


@pytest.mark.parametrize(("path", "expected"), FACTS["hub_paths"]["path_to_url"].items())
def test_path_to_url(path: str, expected: str) -> None:
    assert backbones.convert_path_or_url_to_url(path) == expected


def test_home_directory_and_relative_paths_become_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert backbones.convert_path_or_url_to_url("~/a.pth") == (tmp_path / "a.pth").as_uri()
    assert backbones.convert_path_or_url_to_url("a.pth") == (tmp_path / "a.pth").as_uri()


def test_every_backbone_has_an_entry() -> None:
    entries = {name for name in backbones.__all__ if name.startswith("dinov3_")}
    assert entries == {key.split(":")[0] for key in BACKBONES}


def test_names_of_weights() -> None:
    assert {member.name: member.value for member in Weights} == FACTS["hub_paths"]["weights"]
