"""Golden cases of `mask2former`: deformable attention, position encoding, adapter, head and the whole segmentor."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.eval.segmentation.inference import make_inference
from dinov3.heads.backbone_layers import BackboneLayersSet, backbone_out_indices
from dinov3.heads.segmentation import FeatureDecoder, build_segmentation_decoder
from dinov3.hub.segmentors import dinov3_vit7b16_ms
from dinov3.layers import MSDeformAttn, ms_deform_attn
from dinov3.layers.deformable_attention import cell_centres
from dinov3.layers.position_encodings import grid_sine_encoding
from dinov3.models.vision_transformer import DinoVisionTransformer
from tests.parity import golden
from tests.parity.deterministic import fill_, tensor, uniform
from tests.parity.state_dicts import assert_matches_manifest

GRIDS = [(8, 12), (4, 6), (2, 3)]  # of an image of 64 x 96
Adapter = golden.target("dinov3.eval.segmentation.models.backbone.dinov3_adapter.DINOv3_Adapter")
Head = golden.target("dinov3.eval.segmentation.models.heads.mask2former_head.Mask2FormerHead")


def case_of(name: str) -> dict[str, Any]:
    return golden.case("mask2former", name)


def stored(name: str, output: str) -> tuple[Tensor, dict[str, Any]]:
    """What a case stores of an output, and its description."""
    entry = next(o for o in case_of(name)["outputs"] if o["name"] == output)
    return golden.tensors("mask2former")[entry["key"]], entry


def assert_output(name: str, output: str, got: Tensor, *, share_of_max: float | None = None) -> None:
    """Compare a whole output with what the case stores of it, within the tolerance of its area."""
    want, entry = stored(name, output)
    atol = max(20 * entry.get("float32_noise", 0.0), 1e-5 * entry["abs_max"])
    if share_of_max is not None:
        atol = share_of_max * entry["abs_max"]
    assert list(got.shape) == entry["shape"] and got.dtype == torch.float32, (output, got.shape, got.dtype)
    step = 1 if entry["stored"] == "full" else int(re.fullmatch(r"flatten\(\)\[::(\d+)\]", entry["stored"])[1])  # type: ignore[index]
    part = got.detach().flatten()[::step]
    torch.testing.assert_close(part, want.flatten(), rtol=0, atol=atol, msg=lambda text: f"{output}: {text}")
    whole = got.detach().double()
    statistics = (whole.mean().item(), whole.std(correction=0).item(), whole.abs().max().item())
    assert statistics == pytest.approx((entry["mean"], entry["std"], entry["abs_max"]), rel=0, abs=atol), output


def filled(name: str, module: nn.Module) -> nn.Module:
    """The module of a case with its deterministic weights, in evaluation mode."""
    fill = case_of(name)["fill"]
    fill_(module, fill["seed"])
    with torch.no_grad():
        for step in fill.get("then", []):
            for entry_name, entry in module.state_dict().items():
                if re.search(step["pattern"], entry_name):
                    entry.mul_(step["multiply"])
    return module.eval()


def tiny_vit() -> DinoVisionTransformer:
    return DinoVisionTransformer(**case_of("segmentor")["build"]["vit"])


@functools.cache
def segmentor() -> FeatureDecoder:
    """The whole model of most cases, shared by their tests, which must not change it."""
    vit = tiny_vit()
    vit.init_weights()
    model = build_segmentation_decoder(vit, decoder_type="m2f", hidden_dim=64, num_classes=11)
    return filled("segmentor", model)  # type: ignore[return-value]


@functools.cache
def head() -> Any:
    widths = {level: [48, side, side, 4] for level, side in zip("1234", (64, 32, 16, 8), strict=True)}
    return filled("pixel-decoder", Head(input_shape=widths, hidden_dim=64, num_classes=7, ignore_value=255))


def pyramid() -> dict[str, Tensor]:
    return {k: tensor(f"feat{k}", (2, 48, 2 * f, 3 * f), 8) for k, f in zip("1234", (8, 4, 2, 1), strict=True)}


def test_exact_samples() -> None:
    points = [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [0, 0], [1, 1], [1.3, 0.5], [0.5, -0.2], [0.6, 0.1]]
    value = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    out = ms_deform_attn(value, [(2, 2)], torch.tensor(points).view(1, 9, 1, 1, 1, 2), torch.ones(1, 9, 1, 1, 1))
    assert_output("msda-core-exact", "out", out)


def test_core_and_its_gradients() -> None:
    n, m, d, queries, levels, points = 2, 3, 5, 7, 2, 2
    value = tensor("value", (n, 39, m, d), 1).requires_grad_()
    locations = (uniform("locations", (n, queries, m, levels, points, 2), 1) * 1.6 - 0.3).requires_grad_()
    weights = tensor("weights", (n, queries, m, levels * points), 1).softmax(-1).view(n, queries, m, levels, points)
    weights.requires_grad_()
    out = ms_deform_attn(value, [(6, 4), (3, 5)], locations, weights)
    (out * tensor("cotangent", tuple(out.shape), 1)).sum().backward()
    assert_output("msda-core", "out", out)
    for name, leaf in {"value": value, "locations": locations, "weights": weights}.items():
        assert leaf.grad is not None
        assert_output("msda-core", f"grad_{name}", leaf.grad)


@pytest.mark.parametrize(
    ("name", "seed", "options", "shapes", "batch", "queries", "width"),
    [
        ("msda-module-points", 2, (32, 3, 4, 4, 0.5), [(2, 3), (4, 6), (8, 12)], 2, 9, 2),
        ("msda-module-boxes", 3, (32, 2, 8, 3, 1.0), [(5, 7), (3, 4)], 1, 11, 4),
    ],
)
def test_deformable_attention(
    name: str, seed: int, options: Any, shapes: Any, batch: int, queries: int, width: int
) -> None:
    module = filled(name, MSDeformAttn(*options))
    n_cells = sum(height * width for height, width in shapes)
    references = uniform("reference_points", (batch, queries, len(shapes), width), seed)
    query, inputs = tensor("query", (batch, queries, 32), seed), tensor("input", (batch, n_cells, 32), seed)
    mask = uniform("mask", (batch, n_cells), seed) < 0.3 if width == 2 else None
    assert_output(name, "out", module(query, references, inputs, shapes, mask))


@pytest.mark.parametrize(("heads", "levels", "points"), [(8, 2, 3), (16, 1, 4)])
def test_initial_deformable_attention(heads: int, levels: int, points: int) -> None:
    module = MSDeformAttn(4 * heads, n_levels=levels, n_heads=heads, n_points=points)
    assert_output("msda-init", f"heads{heads}_levels{levels}_points{points}", module.sampling_offsets.bias)
    zeros = (module.sampling_offsets.weight, *module.attention_weights.parameters())
    assert not any(x.any() for x in (*zeros, module.value_proj.bias, module.output_proj.bias))


def test_sine_encodings() -> None:
    assert_output("sine-normalized", "pos", grid_sine_encoding(torch.ones(1, 5, 7, dtype=torch.bool), 16))
    plain = grid_sine_encoding(torch.ones(1, 4, 3, dtype=torch.bool), 8, normalize=False, scale=1.0)
    assert_output("sine-plain", "pos", plain)
    valid = torch.zeros(2, 6, 5, dtype=torch.bool)
    valid[0, :6, :3], valid[1, :4, :5] = True, True
    assert_output("sine-mask", "pos", grid_sine_encoding(valid, 8, scale=3.0, temperature=20))


def test_spatial_prior() -> None:
    maps = segmentor().segmentation_model[0].spm(tensor("x", (2, 3, 64, 96), 21))
    for name, got in zip(("c1", "c2", "c3", "c4"), maps, strict=True):
        assert_output("adapter-spm", name, got)


def test_extractor() -> None:
    extractor = segmentor().segmentation_model[0].interactions[0].extractor
    tokens, block = tensor("c", (2, 126, 64), 21), tensor("feat", (2, 24, 64), 21)
    assert_output("adapter-extractor", "out", extractor(tokens, cell_centres(GRIDS), block, (4, 6), GRIDS))


def test_adapter() -> None:
    for level, got in segmentor().segmentation_model[0](tensor("x", (2, 3, 64, 96), 21)).items():
        assert_output("adapter", f"level{level}", got)


def test_adapter_with_other_options() -> None:
    step = case_of("adapter-options")["build"]["steps"][-1]
    options = eval(re.search(r"\*\*(\{.*\})", step)[1])  # type: ignore[index]
    vit = DinoVisionTransformer(**case_of("adapter-options")["build"]["vit"])
    vit.init_weights()
    adapter = filled("adapter-options", Adapter(vit, **options))
    for level, got in adapter(tensor("x", (1, 3, 96, 64), 5)).items():
        assert_output("adapter-options", f"level{level}", got)


def test_pixel_decoder() -> None:
    mask_features, maps = head().pixel_decoder(pyramid())
    assert_output("pixel-decoder", "mask_features", mask_features)
    for i, got in enumerate(maps):
        assert_output("pixel-decoder", f"scale{i}", got)


def test_mask_decoder() -> None:
    maps = [tensor(f"scale{i}", (2, 64, f, 2 * f), 8) for i, f in enumerate((1, 2, 4))]
    *auxiliary, last = head().predictor(maps, tensor("mask_features", (2, 64, 8, 16), 8))
    assert_output("mask-decoder", "pred_logits", last["pred_logits"])
    assert_output("mask-decoder", "pred_masks", last["pred_masks"])
    assert_output("mask-decoder", "aux0_logits", auxiliary[0]["pred_logits"])
    assert_output("mask-decoder", "aux0_masks", auxiliary[0]["pred_masks"])
    assert_output("mask-decoder", "aux5_masks", auxiliary[5]["pred_masks"])
    # The case has queries whose masks are off everywhere.
    blocked = case_of("mask-decoder")["facts"]["rows_fully_masked_before_each_of_10_predictions"]
    grids = [maps[i % 3].shape[-2:] for i in range(10)]
    got = [
        int((nn.functional.interpolate(p["pred_masks"], grid, mode="bilinear") < 0).flatten(2).all(-1).sum())
        for p, grid in zip((*auxiliary, last), grids, strict=True)
    ]
    assert got == blocked


def test_head_predicts_resized_logits() -> None:
    prediction = head().predict(pyramid(), rescale_to=(50, 71))
    assert prediction.keys() == {"pred_logits", "pred_masks"}
    for name, got in prediction.items():
        assert_output("head-predict", name, got)


def test_segmentor() -> None:
    out = segmentor()(tensor("x", (1, 3, 64, 96), 21))
    assert_output("segmentor", "pred_logits", out["pred_logits"])
    assert_output("segmentor", "pred_masks", out["pred_masks"])
    assert len(out["aux_outputs"]) == 9
    assert_output("segmentor", "aux8_logits", out["aux_outputs"][8]["pred_logits"])


INFERENCES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "m2f-slide": (
        "img",
        (1, 3, 112, 160),
        {"inference_mode": "slide", "rescale_to": (101, 143), "crop_size": (64, 96), "stride": (48, 64)},
    ),
    "m2f-slide-small": (
        "small",
        (1, 3, 64, 96),
        {
            "inference_mode": "slide",
            "rescale_to": (64, 96),
            "crop_size": (128, 160),
            "stride": (32, 32),
            "output_activation": functools.partial(torch.softmax, dim=1),
        },
    ),
    "m2f-whole-flip": (
        "img",
        (1, 3, 112, 160),
        {"inference_mode": "whole", "rescale_to": (40, 56), "apply_horizontal_flip": True},
    ),
}


@pytest.mark.parametrize("name", INFERENCES)
def test_inference(name: str) -> None:
    key, shape, options = INFERENCES[name]
    got = make_inference(tensor(key, shape, 21), segmentor(), decoder_head_type="m2f", n_output_channels=11, **options)
    assert_output(name, "map" if name == "m2f-whole-flip" else "map_float32", got)


def test_gradients_of_the_segmentor() -> None:
    model = segmentor()
    model.zero_grad()
    out = model(tensor("x", (1, 3, 64, 64), 21))
    parts = {"gl": out["pred_logits"], "gm": out["pred_masks"]}
    loss = sum((x * tensor(key, tuple(x.shape), 21)).mean() for key, x in parts.items())
    assert isinstance(loss, Tensor)
    loss.backward()
    assert_output("segmentor-grad", "loss", loss[None])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for output in case_of("segmentor-grad")["outputs"][1:]:
        gradient = gradients[output["name"]]
        assert gradient is not None
        assert_output("segmentor-grad", output["name"], gradient, share_of_max=0.02)
    assert all(gradient is None for name, gradient in gradients.items() if ".backbone." in name)
    model.zero_grad()


@pytest.mark.parametrize("n_blocks", [12, 24, 32, 40])
def test_blocks_of_a_backbone(n_blocks: int) -> None:
    class Blocks:
        def __init__(self) -> None:
            self.n_blocks = n_blocks

    for name, want in case_of("layer-indices")["facts"][str(n_blocks)].items():
        assert backbone_out_indices(Blocks(), BackboneLayersSet[name]) == want


def test_entries_of_the_tiny_model() -> None:
    with torch.device("meta"):
        model = build_segmentation_decoder(tiny_vit(), decoder_type="m2f", hidden_dim=64, num_classes=11)
    assert_matches_manifest(model, "mask2former_tiny")
    assert_matches_manifest(model.segmentation_model[0], "mask2former_tiny_adapter")
    assert_matches_manifest(model.segmentation_model[1], "mask2former_tiny_head")


def test_entries_of_the_published_model() -> None:
    model = dinov3_vit7b16_ms(pretrained=False, device="meta")
    assert all(entry.is_meta for entry in model.state_dict().values())
    assert_matches_manifest(model, "dinov3_vit7b16_ms")
    count = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.segmentation_model.named_children()
    }
    backbone = sum(p.numel() for p in model.segmentation_model[0].backbone.parameters())
    millions = [round(n / 1e6) for n in (backbone, count["0"] - backbone, count["1"])]
    assert millions == [6716, 227, 700]


def test_every_case_is_run() -> None:
    names = {node.value for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Constant)}
    assert {case["id"] for case in golden.cases("mask2former")} <= names
