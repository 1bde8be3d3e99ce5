"""Images of another dtype than the weights: refused in words, unless something casts one to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.export import Dim

from dinov3 import distributed
from dinov3.distributed import runtime
from dinov3.fsdp import ac_compile_parallelize
from dinov3.hub.optimize import optimize
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make_vit() -> Any:
    torch.manual_seed(0)
    model = DinoVisionTransformer(embed_dim=32, depth=1, num_heads=2, pos_embed_rope_dtype="fp32")
    model.init_weights()
    return model.eval()


def make_convnext() -> Any:
    torch.manual_seed(0)
    return ConvNeXt(depths=[1, 1, 1, 1], dims=[8, 8, 8, 8]).eval()


@pytest.fixture(params=[make_vit, make_convnext], ids=["vit", "convnext"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param()


CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "forward": lambda model, images: model(images),
    "list": lambda model, images: model.forward_features([images, images]),
    "layers": lambda model, images: model.get_intermediate_layers(images),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("weights", "images"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_both_dtypes_and_the_way_out_are_named(call: str, weights: str, images: str, model: Any) -> None:
    model.to(getattr(torch, weights))
    with pytest.raises(ValueError) as caught:
        CALLS[call](model, IMAGES.to(getattr(torch, images)))
    assert str(caught.value) == (
        f"the images are torch.{images}, the weights of the model torch.{weights}: cast the images, "
        f"images.to(torch.{weights}), or call the model under torch.autocast('cpu', torch.bfloat16)"
    )
    assert CALLS[call](model, IMAGES.to(getattr(torch, weights))) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert CALLS[call](model, IMAGES.to(getattr(torch, images))) is not None


def test_autocast_is_not_advised_where_it_does_not_help(model: Any) -> None:
    with pytest.raises(ValueError, match=r"float64, the weights .* torch.float32: cast .* images.to\(torch.float32\)$"):
        model(IMAGES.double())


def test_other_errors_stay_what_they_are(model: Any) -> None:
    model.to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        model(IMAGES)


@torch.no_grad()
def test_prepared_models_cast_images_themselves(model: Any) -> None:
    assert optimize(model, torch.bfloat16)(IMAGES).shape == (2, model.embed_dim)


@torch.no_grad()
@pytest.mark.parametrize(("make", "is_autocast"), [(make_vit, True), (make_convnext, False)])
def test_compiled_graphs_are_whole(make: Callable[[], Any], is_autocast: bool) -> None:
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.autocast("cpu", enabled=is_autocast):
        torch.testing.assert_close(compiled(IMAGES), model(IMAGES))


@torch.no_grad()
def test_programs_are_exported(model: Any) -> None:
    program = torch.export.export(model, (IMAGES,), dynamic_shapes={"x": {0: Dim("batch")}}, strict=True)
    torch.testing.assert_close(program.module()(IMAGES[:1].expand(3, -1, -1, -1))[:1], model(IMAGES[:1]))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(runtime.DEVICE_VARIABLE, "cpu")
    yield
    distributed.disable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("on_cpu")
def test_sharded_models_in_mixed_precision_take_both(dtype: torch.dtype, model: Any) -> None:
    off = dict.fromkeys(("checkpointing", "checkpointing_full", "compile", "cudagraphs"), False)
    precision = {"param_dtype": "bf16", "reduce_dtype": "fp32", "sharding_strategy": "SHARD_GRAD_OP"}
    cfg = OmegaConf.create({"train": {"fsdp": "auto", **off}, "compute_precision": precision})
    ac_compile_parallelize(nn.ModuleDict({"backbone": model}), [], cfg)
    assert next(model.parameters()).dtype == torch.float32
    assert model(IMAGES.to(dtype)).dtype == torch.bfloat16
    model(IMAGES.to(dtype), is_training=True)["x_norm_patchtokens"].float().square().sum().backward()
