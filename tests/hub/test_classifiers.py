"""The published classifier by name: where its two weights may come from, and what is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.hub import classifiers, sources
from dinov3.hub.architectures import PUBLISHED, PublishedViT
from dinov3.hub.backbones import Weights, dinov3_vit7b16
from dinov3.hub.classifiers import ClassifierWeights, dinov3_vit7b16_lc
from dinov3.utils.weight_files import WeightsError

IMAGES = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
Files = dict[str, Any]


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The 7B in a size for tests, of 5 classes, and a cache of its own."""
    hashes = {"LVD1689M": "a955f4ea", "SAT493M": "a6675841"}
    small = PublishedViT(32, 2, 2, 3, "swiglu64", hashes, qkv_bias=False, untied=frozenset(hashes))
    monkeypatch.setitem(PUBLISHED, "dinov3_vit7b16", small)
    monkeypatch.setattr(classifiers, "N_CLASSES", 5)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Paths and contents of both parts."""
    torch.manual_seed(0)
    backbone = {k: v + 0.1 * torch.randn_like(v) for k, v in dinov3_vit7b16(pretrained=False).state_dict().items()}
    head = {"weight": torch.randn(5, 64), "bias": torch.randn(5)}
    torch.save(backbone, tmp_path / "backbone.pth")
    torch.save(head, tmp_path / "head.pth")
    return {
        "backbone": tmp_path / "backbone.pth",
        "head": tmp_path / "head.pth",
        "state": {f"backbone.{k}": v for k, v in backbone.items()} | {f"linear_head.{k}": v for k, v in head.items()},
    }


def load(files: Files, **kwargs: Any) -> Any:
    return dinov3_vit7b16_lc(**{"weights": files["head"], "backbone_weights": files["backbone"], **kwargs})


def assert_holds(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


def test_both_weights_from_files(files: Files, tmp_path: Path) -> None:
    model = load(files)
    assert_holds(model, files["state"])
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    features = model.backbone(IMAGES, is_training=True)
    both = torch.cat([features["x_norm_clstoken"], features["x_norm_patchtokens"].mean(1)], dim=1)
    torch.testing.assert_close(model(IMAGES), both @ model.linear_head.weight.T + model.linear_head.bias)
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    head = torch.load(files["head"])
    for weights in (str(files["head"]), files["head"].as_uri(), head, tmp_path / "whole.pth"):
        assert_holds(load(files, weights=weights, mmap=False), files["state"])
    with torch.no_grad():
        load(files, weights=head).linear_head.weight.zero_()
    assert head["weight"].any()


def test_published_weights_come_from_their_addresses(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(url: str, path: Path, **_: Any) -> None:
        asked.append(url.rpartition("/")[2])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files["head" if "head" in url else "backbone"].read_bytes())

    monkeypatch.setattr(sources, "download", download)
    assert_holds(dinov3_vit7b16_lc(weights="imagenet1k", backbone_weights=Weights.SAT493M), files["state"])
    assert asked == [
        "dinov3_vit7b16_pretrain_sat493m-a6675841.pth",
        "dinov3_vit7b16_imagenet1k_linear_head-90d8ed92.pth",
    ]
    dinov3_vit7b16_lc(hash="01234567", backbone_weights=files["backbone"])
    assert asked[2:] == ["dinov3_vit7b16_imagenet1k_linear_head-01234567.pth"]


def test_hash_of_both_files_is_checked(files: Files, tmp_path: Path) -> None:
    wrong = [files[part].rename(tmp_path / f"{part}-01234567.pth") for part in ("backbone", "head")]
    for part, path in zip(("backbone_weights", "weights"), wrong, strict=True):
        good = dinov3_vit7b16(pretrained=False).state_dict()
        other = {"backbone_weights": good} | {part: path}
        with pytest.raises(WeightsError, match=f"{path.name} does not match the hash in its name"):
            dinov3_vit7b16_lc(**other, check_hash=True)


def test_dtype_and_device_hold_for_both_parts(files: Files) -> None:
    model = load(files, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.backbone.rope_embed.periods.dtype == torch.float32
    assert model(IMAGES.bfloat16()).dtype == torch.bfloat16
    assert all(t.is_meta for t in dinov3_vit7b16_lc(pretrained=False, device="meta").state_dict().values())


def test_random_start_reads_nothing() -> None:
    model = dinov3_vit7b16_lc(pretrained=False)
    assert model(IMAGES).shape == (2, 5) and model.linear_head.bias.eq(0).all()
    with pytest.raises(ValueError, match="weights are given, but pretrained=False reads none"):
        dinov3_vit7b16_lc(pretrained=False, weights="a.pth")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"weight": torch.ones(7, 64), "bias": torch.ones(7)},
            r"expected weight \[5, 64\], bias \[5\], found weight",
        ),
        ({"weight": torch.ones(5, 64)}, r"found weight \[5, 64\]\.$"),
        ({"weight": torch.ones(5, 64), "bias": 3}, r"found weight \[5, 64\], bias int\.$"),
        ({"weight": torch.ones(5, 64), "bias": torch.ones(5), "more": torch.ones(1)}, r"more \[1\]\.$"),
        ({}, "found nothing"),
    ],
)
def test_head_that_does_not_fit(files: Files, state: Any, message: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=f"^{tmp_path / 'w.pth'} does not fit the head of .*_lc: .*{message}"):
        load(files, weights=tmp_path / "w.pth")


def test_interchanged_weights_are_recognised(files: Files) -> None:
    with pytest.raises(WeightsError, match="the weights of a backbone: pass them as backbone_weights="):
        load(files, weights=files["backbone"])
    with pytest.raises(WeightsError):
        load(files, backbone_weights=files["head"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": 1}, "no keyword argument 'weight' .did you mean 'weights'"),
        ({"autocast_dtype": torch.float32}, "no keyword argument 'autocast_dtype'"),
        ({"weights": 3}, "weights must be a ClassifierWeights, a path, a URL or a state dict, got 3"),
        ({"hash": "01234567"}, "hash can only select published weights"),
        ({"backbone_weights": "none.pth"}, "no weights at none.pth"),
    ],
)
def test_bad_arguments(files: Files, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        load(files, **kwargs)


def test_signature() -> None:
    defaults = {name: p.default for name, p in inspect.signature(dinov3_vit7b16_lc).parameters.items()}
    del defaults["kwargs"]
    assert defaults == {
        "pretrained": True,
        "weights": ClassifierWeights.IMAGENET1K,
        "backbone_weights": Weights.LVD1689M,
        "check_hash": False,
    }
    assert {member.name: member.value for member in ClassifierWeights} == {"IMAGENET1K": "IMAGENET1K"}
