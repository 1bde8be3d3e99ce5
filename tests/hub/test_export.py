"""Backbones as ONNX and torch.export files."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.hub import export
from dinov3.hub.command_line import ModelChoice
from dinov3.hub.export import ExportOptions, WrongExportError
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer

SIZES = [(1, 3, 64, 64), (2, 3, 90, 131), (3, 3, 224, 64)]


class Given(ModelChoice):
    """A choice of a model that is there already."""

    model: nn.Module

    @classmethod
    def of(cls, model: nn.Module) -> Given:
        choice = cls("dinov3_vits16", "sat493m.pth")
        object.__setattr__(choice, "model", model.eval())
        return choice

    def load(self, *, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        return self.model


def vit(**options: Any) -> DinoVisionTransformer:
    torch.manual_seed(0)
    published = {"n_storage_tokens": 2, "mask_k_bias": True, "layerscale_init": 1.0, "pos_embed_rope_dtype": "fp32"}
    model = DinoVisionTransformer(embed_dim=32, depth=1, num_heads=2, **published | options)
    model.init_weights()
    nn.init.normal_(model.blocks[0].attn.qkv.weight)  # type: ignore[union-attr, arg-type]  # Positions must matter.
    return model


def convnext() -> ConvNeXt:
    torch.manual_seed(0)
    model = ConvNeXt(depths=[1, 1, 1, 1], dims=[4, 8, 8, 16], layer_scale_init_value=1.0)
    model.init_weights()
    return model


def options_for(model: nn.Module, out: Path, **changes: Any) -> ExportOptions:
    kind = "onnx" if out.suffix == ".onnx" else "torch-export"
    return replace(ExportOptions(Given.of(model), kind, out, size=(64, 96)), **changes)


def outputs_of(path: Path, images: Tensor) -> dict[str, Tensor]:
    if path.suffix == ".pt2":
        return dict(torch.export.load(path).module()(images))
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(None, {"images": images.numpy()})
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def assert_gives_the_features_of(model: Any, path: Path, names: list[str]) -> None:
    for shape in SIZES:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            features = model.forward_features(images)
        found = outputs_of(path, images)
        assert list(found) == names
        for name, tensor in found.items():
            key = {"cls_token": "clstoken", "patch_tokens": "patchtokens"}.get(name)
            expected = features["x_storage_tokens" if key is None else f"x_norm_{key}"]
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)


# Of a square image, whose sides could be taken for one and the same; with the layers that the defaults do not have.
OPTIONS = {"ffn_layer": "swiglu64", "norm_layer": "rmsnorm", "untie_cls_and_patch_norms": True}


def square_vit() -> DinoVisionTransformer:
    return vit(**OPTIONS, pos_embed_rope_dtype="bf16")


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An ONNX file of `square_vit`, and what was printed to stderr while it was made."""
    out = tmp_path_factory.mktemp("onnx") / "square.onnx"
    notes = StringIO()
    with redirect_stderr(notes):
        export.export(options_for(square_vit(), out, size=(64, 64), opset=20))
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return out, notes.getvalue()


def test_an_onnx_file_of_a_vit_takes_any_size(onnx_file: tuple[Path, str]) -> None:
    model = square_vit()
    model.rope_embed.dtype, model.rope_embed.periods = torch.float32, model.rope_embed.periods.float()
    assert_gives_the_features_of(model, onnx_file[0], ["cls_token", "storage_tokens", "patch_tokens"])


def test_an_onnx_file_names_its_sizes_and_its_normalisation(onnx_file: tuple[Path, str]) -> None:
    import onnx

    model = onnx.load(onnx_file[0])
    onnx.checker.check_model(model)
    (images,) = model.graph.input
    dims = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"]
    patches = model.graph.output[2].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in patches] == ["batch", "((height//16))*((width//16))", 32]
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["model"] == "dinov3_vits16" and json.loads(properties["mean"]) == [0.430, 0.411, 0.296]
    assert model.opset_import[0].version == 20


def test_positions_in_low_precision_become_float32_in_onnx(onnx_file: tuple[Path, str]) -> None:
    assert "computes positions in bfloat16, which ONNX cannot; the file uses float32" in onnx_file[1]


def test_a_convnext_in_onnx_has_no_storage_tokens(tmp_path: Path) -> None:
    model = convnext()
    export.export(options_for(model, tmp_path / "model.onnx"))
    assert_gives_the_features_of(model, tmp_path / "model.onnx", ["cls_token", "patch_tokens"])


def test_a_vit_in_torch_export_takes_any_size_and_differences_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = vit()
    differences = export.export(options_for(model, tmp_path / "x.pt2", size=(48, 80)))
    assert [difference.shape for difference in differences] == [(3, 3, 96, 32), (2, 3, 64, 64)]
    assert all(difference.relative < 1e-5 for difference in differences)
    assert "images 3 x 3 x 96 x 32: largest difference cls_token" in capsys.readouterr().out
    extra = {export.INFO_FILE: ""}
    torch.export.load(tmp_path / "x.pt2", extra_files=extra)
    assert json.loads(extra[export.INFO_FILE])["patch_size"] == 16
    assert_gives_the_features_of(model, tmp_path / "x.pt2", ["cls_token", "storage_tokens", "patch_tokens"])


def give_another_output(images: Tensor) -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in export.Features(vit().eval())(images).items()}


def take_one_size(images: Tensor) -> dict[str, Tensor]:
    raise RuntimeError(f"expected images of 64 x 96 pixels\ngot {list(images.shape)}")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (give_another_output, "differs from dinov3_vits16 .* was not written. Versions: torch 2"),
        (take_one_size, r"does not take images of shape \[1, 3, 48, 80\]: expected images of 64 x 96 pixels$"),
    ],
)
def test_a_wrong_file_is_not_left_behind(
    run: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_trace", lambda *args: None)
    monkeypatch.setattr(export, "_write_onnx", lambda program, file, *args: file.write_bytes(b""))
    monkeypatch.setattr(export, "_open_onnx", lambda file: run)
    with pytest.raises(WrongExportError, match=message):
        export.export(options_for(vit(), tmp_path / "x.onnx"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoilt", [float("nan"), 1.0])
def test_every_output_is_compared(spoilt: float) -> None:
    model = export.Features(vit().eval())

    def run(images: Tensor) -> dict[str, Tensor]:
        outputs = model(images)
        outputs["storage_tokens"] = outputs["storage_tokens"] + spoilt
        return dict(outputs)

    assert export.compare(model, run, (1, 3, 32, 32)).relative > export.TOLERANCE


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"needs {package}: pip install onnx onnxscript onnxruntime"):
        export.export(options_for(vit(), tmp_path / "x.onnx"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"out": Path("x.pth")}, ValueError, "files of --format onnx end in .onnx"),
        ({"out": Path("nowhere/x.onnx")}, FileNotFoundError, "there is no directory nowhere"),
        ({"opset": 5}, ValueError, "--opset 5: expected 18 to"),
        ({"size": (8, 64)}, ValueError, "8 x 64 pixels is smaller than a patch"),
        ({"model": ModelChoice("dinov3_vitx16")}, ValueError, "unknown model 'dinov3_vitx16' .did you mean"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        export.export(replace(options_for(vit(), tmp_path / "x.onnx"), **changes))


def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    out = tmp_path / "x.onnx"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        export.main(f"dinov3_vits16 --weights x.pth --format onnx --out {out}".split())
    assert out.read_text() == "mine"
