from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.hub.optimize import _Layer, _PackedLinear, optimize
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer

from .libraries import IMAGES, randomise_


def _vit(**options: Any) -> Any:
    model = DinoVisionTransformer(
        embed_dim=32,
        depth=2,
        num_heads=2,
        n_storage_tokens=4,
        layerscale_init=1e-5,
        mask_k_bias=True,
        pos_embed_rope_dtype="fp32",
        **options,
    )
    model.init_weights()
    return randomise_(model)


def _gated_vit() -> Any:
    return _vit(ffn_layer="swiglu", norm_layer="rmsnorm", untie_cls_and_patch_norms=True)


def _convnext() -> Any:
    return randomise_(ConvNeXt(depths=[1, 1, 2, 1], dims=[8, 16, 24, 32]))


MAKERS = [_vit, _gated_vit, _convnext]


@torch.inference_mode()
def _features(model: Any, images: Tensor = IMAGES, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        features = model.forward_features(images)
        features["layers"] = torch.cat(model.get_intermediate_layers(images, n=1))
    return {name: tensor for name, tensor in features.items() if tensor is not None}


def _assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], relative: float) -> None:
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        difference, largest = (t.abs().amax() if t.numel() else 0 for t in (found[name] - tensor, tensor))
        assert difference <= relative * largest, name


def _products(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, (_Layer, _PackedLinear))]


@pytest.fixture(params=["packed", "plain"])
def packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr("dinov3.hub.optimize._can_be_packed", lambda weight: False)
    return request.param


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_stay_the_same(make: Any, dtype: torch.dtype, packing: str) -> None:
    model, images = make().to(dtype), IMAGES.to(dtype)
    wanted = _features(model, images)
    assert optimize(model) is model
    # In low precision a packed linear rounds once where two modules round twice.
    relative = {"plain": 0, "packed": 1e-5 if dtype == torch.float32 else 0.03}[packing]
    _assert_near(_features(model, images), wanted, relative)


@pytest.mark.parametrize("make", MAKERS)
def test_low_precision_computes_what_autocast_does(make: Any, packing: str) -> None:
    model = make()
    exact, wanted = _features(model), _features(model, autocast=torch.bfloat16)
    optimize(model, torch.bfloat16)
    found = _features(model)
    _assert_near(found, wanted, 0 if packing == "plain" else 0.02)
    assert not torch.equal(exact["x_prenorm"], found["x_prenorm"])
    assert len(_products(model)) > 8
    assert {getattr(m, "dtype", m.weight.dtype) for m in _products(model)} == {torch.bfloat16}


def test_packed_linears_apply_the_gelu() -> None:
    model = optimize(_vit())
    assert [m.activation for m in _products(model.blocks[0])] == ["none", "none", "gelu", "none"]
    assert isinstance(model.blocks[0].mlp.act, nn.Identity)


def test_it_is_not_for_training() -> None:
    with pytest.raises(ValueError, match=r"training mode: call eval\(\)"):
        optimize(nn.Linear(2, 2))
    model = optimize(_vit())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_dtype_of_full_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.bfloat16, torch.float16 or None, got torch.float64"):
        optimize(_vit(), torch.float64)


@pytest.mark.parametrize(
    ("use", "verb"),
    [
        (copy.deepcopy, "copied or pickled"),
        (pickle.dumps, "copied or pickled"),
        (lambda model: torch.save(model, io.BytesIO()), "copied or pickled"),
        (lambda model: model.state_dict(), "saved: it has no state dict"),
        (lambda model: nn.Sequential(model).state_dict(), "saved: it has no state dict"),
        (lambda model: model.load_state_dict({}, strict=False), "filled from a state dict"),
    ],
)
def test_what_would_lose_weights_is_refused_with_the_way_out(
    use: Callable[[nn.Module], Any], verb: str, packing: str
) -> None:
    with pytest.raises(RuntimeError, match=rf"cannot be {verb}, .*Save, load or copy the model before optimize\(\)"):
        use(optimize(_convnext()))
