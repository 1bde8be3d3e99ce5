"""What the ViT and the ConvNeXt share: choosing layers, and exporters of PyTorch applied to the plain models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import Dim

from dinov3.hub.architectures import SHARED_VIT_OPTIONS
from dinov3.models.backbone import Backbone
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer

#: Neither of the batch size, nor of the size, that is traced; square, tall and wide.
SHAPES = [(1, 3, 64, 64), (3, 3, 150, 75), (2, 3, 70, 131)]
DYNAMIC = {0: "batch", 2: "height", 3: "width"}


def vit(**options: Any) -> Backbone:
    """A small model with the options of the published ones."""
    torch.manual_seed(0)
    options = SHARED_VIT_OPTIONS | {"embed_dim": 32, "depth": 2, "num_heads": 2, "layerscale_init": 1.0} | options
    model = DinoVisionTransformer(**options)
    model.init_weights()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight)  # Positions must matter.
    return model.eval()


def convnext() -> Backbone:
    torch.manual_seed(0)
    model = ConvNeXt(depths=[1, 1, 1, 1], dims=[4, 8, 8, 16], layer_scale_init_value=1.0)
    model.init_weights()
    return model.eval()


@pytest.mark.parametrize("make", [vit, convnext])
def test_layers_are_chosen_by_integers_of_any_kind(make: Callable[[], Backbone]) -> None:
    model: Any = make()
    images = torch.randn(1, 3, 64, 64)
    for n, same in [(np.int64(2), 2), (np.array([1, 0]), [0, 1]), ([np.int32(1)], [1]), (torch.tensor([1]), [1])]:
        found, want = (model.get_intermediate_layers(images, n=value) for value in (n, same))
        assert len(found) == len(want) and all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    for wrong in (np.int64(0), np.array([9]), 1.5, [0.0, 1.0], None, []):
        with pytest.raises(ValueError, match="n must be a number of layers from 1 to"):
            model.get_intermediate_layers(images, n=wrong)


def with_torch_export(model: Backbone, images: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    smallest = 32 if isinstance(model, DinoVisionTransformer) else 64
    sides = {axis: Dim(DYNAMIC[axis], min=smallest) for axis in (2, 3)}
    program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: Dim("batch"), **sides}})
    return program.module()  # type: ignore[return-value]


def with_onnx_of_torch_export(model: Backbone, images: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    names: Any = {"input_names": ["images"], "output_names": ["features"]}
    torch.onnx.export(model, (images,), file, dynamo=True, dynamic_shapes={"x": DYNAMIC}, verbose=False, **names)
    return open_onnx(file)


def with_onnx_of_torchscript(model: Backbone, images: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    names: Any = {"input_names": ["images"], "output_names": ["features"]}
    axes = {"images": DYNAMIC, "features": {0: "batch"}}
    torch.onnx.export(model, (images,), file, dynamo=False, dynamic_axes=axes, **names)
    return open_onnx(file)


def open_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


EXPORTERS = [with_torch_export, with_onnx_of_torch_export, with_onnx_of_torchscript]


@pytest.mark.filterwarnings("ignore")  # The exporters' own: deprecations, and that checks of shapes are not recorded.
@pytest.mark.parametrize("export", EXPORTERS)
@pytest.mark.parametrize("make", [vit, convnext])
def test_plain_models_can_be_exported_for_any_size(
    make: Callable[[], Backbone], export: Callable[..., Callable[[Tensor], Tensor]], tmp_path: Path
) -> None:
    model = make()
    run = export(model, torch.randn(2, 3, 64, 96), tmp_path / "model.onnx")
    for shape in SHAPES:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(run(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", ["min", "max"])
def test_which_side_is_longer_is_not_frozen_into_an_export(side: str, tmp_path: Path) -> None:
    model = vit(pos_embed_rope_normalize_coords=side, depth=1)
    run = with_onnx_of_torchscript(model, torch.randn(2, 3, 64, 96), tmp_path / "model.onnx")
    tall = torch.randn(1, 3, 96, 48)
    with torch.no_grad():
        torch.testing.assert_close(run(tall), model(tall), rtol=1e-4, atol=1e-4)
