"""Golden cases of the layers and of the ViTs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from dinov3.layers import RopePositionEmbedding, SwiGLUFFN
from dinov3.models import vision_transformer
from dinov3.models.vision_transformer import DinoVisionTransformer, norm_layer_dict
from dinov3.utils import named_apply

from . import backbones_runner, golden

LAYERS = ("rope", "attn", "block", "ffn", "dino_head", "norm", "patch_embed", "layerscale")
VITS = ("tiny", "vits16", "vitb16")
FACTS = golden.area("backbones")["facts"]


@pytest.mark.parametrize("case", golden.cases("backbones", *LAYERS), ids=lambda c: c["id"])
def test_layer_outputs_equal_the_published_method(case: dict[str, Any]) -> None:
    backbones_runner.check(case)


@pytest.mark.parametrize("case", golden.cases("backbones", *VITS), ids=lambda c: c["id"])
def test_vit_outputs_equal_the_published_method(case: dict[str, Any]) -> None:
    backbones_runner.check(case)


def test_constructor_defaults() -> None:
    parameters = inspect.signature(DinoVisionTransformer).parameters.values()
    got = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    assert got == FACTS["constructor_defaults"]["DinoVisionTransformer"]


@pytest.mark.parametrize("name", FACTS["vit_factories"])
def test_factory_sizes(name: str) -> None:
    want = FACTS["vit_factories"][name]
    with torch.device("meta"):
        for ffn_layer, hidden in want["ffn_hidden"].items():
            model = getattr(vision_transformer, name)(ffn_layer=ffn_layer)
            first = model.blocks[0].mlp.fc1 if ffn_layer == "mlp" else model.blocks[0].mlp.w1
            assert first.out_features == hidden
    assert (model.embed_dim, len(model.blocks), model.num_heads, model.patch_size) == (
        want["embed_dim"],
        want["depth"],
        want["num_heads"],
        want["patch_size"],
    )


def test_names_of_norms() -> None:
    norms = {name: make(8) for name, make in norm_layer_dict.items()}
    assert {n: f"{type(m).__name__} eps {m.eps:g}" for n, m in norms.items()} == {
        name: text.replace("1e-6", "1e-06").replace("1e-5", "1e-05") for name, text in FACTS["norm_layers"].items()
    }


@pytest.mark.parametrize(("arguments", "names"), FACTS["named_apply_order"].items())
def test_order_of_walks(arguments: str, names: list[str]) -> None:
    root = nn.ModuleDict({"a": nn.Sequential(nn.Identity(), nn.Identity()), "b": nn.Identity()})
    visited: list[str] = []
    kwargs = {key: value.strip("'") for key, value in (part.split("=") for part in arguments.split(","))}
    flags = {key: kwargs[key] == "True" for key in ("depth_first", "include_root")}
    named_apply(lambda module, name: visited.append(name), root, name=kwargs["name"], **flags)
    assert visited == names


@pytest.mark.parametrize(("in_features", "hidden", "align_to", "want"), FACTS["swiglu_hidden"]["rows"])
def test_swiglu_widths(in_features: int, hidden: int | None, align_to: int, want: int) -> None:
    if want == 0:
        with pytest.raises(ValueError, match="no channel at all"):
            SwiGLUFFN(in_features, hidden, align_to=align_to)
        return
    assert SwiGLUFFN(in_features, hidden, align_to=align_to).w1.out_features == want


def _init_model() -> DinoVisionTransformer:
    # Large enough for statistics: the golden fact was taken from the 7B's structure at small width.
    model = DinoVisionTransformer(
        embed_dim=256,
        depth=1,
        num_heads=4,
        layerscale_init=1e-5,
        ffn_layer="swiglu",
        n_storage_tokens=4,
        mask_k_bias=True,
        untie_global_and_local_cls_norm=True,
        pos_embed_rope_dtype="fp32",
    )
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)
    torch.manual_seed(0)
    model.init_weights()
    return model


def test_initialisation() -> None:
    state = _init_model().state_dict()
    assert set(state) == set(FACTS["init"])
    for name, want in FACTS["init"].items():
        _assert_initialised(name, state[name], want)


def _assert_initialised(name: str, got: torch.Tensor, want: dict[str, Any]) -> None:
    kind = want["kind"]
    if kind == "constant":
        assert (got == torch.tensor(want["value"])).all(), name
    elif kind == "thirds":
        assert torch.equal(got, torch.tensor(want["value"], dtype=got.dtype).repeat_interleave(len(got) // 3)), name
    elif kind == "uniform":
        assert 0.9 * want["bound"] < got.abs().max() <= want["bound"] + 1e-6, name
    elif kind in ("normal", "truncated_normal"):
        relative_error = 4 / (2 * got.numel()) ** 0.5
        assert abs(got.std() / want["std"] - 1) < relative_error and abs(got.mean()) < relative_error * want["std"], (
            name
        )
    else:
        assert kind == "computed" and name == "rope_embed.periods"
        assert torch.equal(got, RopePositionEmbedding(256, num_heads=4, dtype=torch.float32).periods)
