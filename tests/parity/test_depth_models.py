"""Golden cases of `depth`: padding, encoder, heads, bins and whole depthers; state dicts of the published models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.heads.backbone_layers import BackboneLayersSet
from dinov3.heads.depth.depther import Depther
from dinov3.heads.depth.features_to_depth import create_chmv2_mixlog_bins
from dinov3.hub import backbones
from dinov3.hub.depthers import CHMV2, SYNTHMIX, config_of, dinov3_vit7b16_dd, dinov3_vitl16_chmv2
from dinov3.models.convnext import ConvNeXt
from tests.parity import golden
from tests.parity.dense import assert_expected, assert_output, by_id, case_of, make_input, tiny_vit
from tests.parity.deterministic import fill_
from tests.parity.state_dicts import assert_matches_manifest, read_manifest

HUB = golden.case("depth", "depth/hub/wiring")["expected"]
OTHER_DEPTHERS = ("dd-bf16", "grad")
FLOAT32_DEPTHERS = [
    name
    for case in golden.cases("depth", "depth/depther/")
    if (name := case["id"].rpartition("/")[2]) not in OTHER_DEPTHERS
]


class Blocks:
    """Stands for a backbone of which only the number of blocks matters."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks


def levels_of(case: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    n_levels = sum(name.startswith("patch") for name in case["inputs"])
    return [(make_input(case, f"patch{i}"), make_input(case, f"cls{i}")) for i in range(n_levels)]


def build_head(case: dict[str, Any]) -> Any:
    head = golden.target(case["build"]["class"])(**case["build"]["kwargs"])
    return fill_(head, case["build"]["fill_seed"]).train(case["build"].get("mode") == "train")


def build_depther(case: dict[str, Any], **kwargs: Any) -> Depther:
    """The depther of a case in evaluation mode, with its deterministic weights."""
    build = case["build"]
    if isinstance(build["backbone"], dict):
        backbone: Any = ConvNeXt(**build["backbone"]["kwargs"])
        backbone.init_weights()
    else:
        backbone = tiny_vit("depth", **build.get("vit_over", {}))
    config = golden.target("dinov3.eval.depth.models.DecoderConfig")(**build["config"]["kwargs"])
    depther = golden.target(build.get("function", "dinov3.eval.depth.models.make_depther_from_config"))(
        backbone, config, **kwargs
    )
    assert not any(module.training for module in depther.modules())
    return fill_(depther, build["fill_seed"])


def images_of(case: dict[str, Any]) -> list[Tensor]:
    return [make_input(case, name) for name in sorted(case["inputs"])]


@by_id("depth", "pad/")
def test_images_of_other_sizes(case: dict[str, Any]) -> None:
    adapt = golden.target(case["build"]["class"])(*case["build"]["args"])
    for name in case["inputs"]:
        assert_output(case, name.replace("x", "out"), adapt(make_input(case, name)))


def test_blocks_of_a_backbone() -> None:
    expected = case_of("depth", "encoder/out-indices")["expected"]
    indices_of = golden.target("dinov3.eval.depth.models.encoder._get_backbone_out_indices")
    for n_blocks, row in expected["table"].items():
        for name, want in row.items():
            assert indices_of(Blocks(int(n_blocks)), BackboneLayersSet[name]) == want
            assert indices_of(Blocks(int(n_blocks)), name) == want
    assert indices_of(Blocks(24), [5, 11, 17, 23]) == expected["explicit_[5, 11, 17, 23]_of_24"]


@by_id("depth", "encoder/vit")
def test_encoder(case: dict[str, Any]) -> None:
    backbone = fill_(tiny_vit("depth"), case["build"]["fill_seed"])
    encoder = golden.target(case["build"]["class"])(backbone, **case["build"]["kwargs"])
    levels = encoder(make_input(case, "x"))
    for i, (patches, class_token) in enumerate(levels):
        assert_output(case, f"patch{i}", patches)
        assert_output(case, f"cls{i}", class_token)
    assert len(levels) == 4
    assert {name: getattr(encoder, name) for name in case["expected"]} == case["expected"]


@by_id("depth", *(f"dpt/{name}" for name in ("dd-even", "dd-o", "chmv2", "pyramid", "defaults")))
def test_dpt_head(case: dict[str, Any]) -> None:
    head, levels = build_head(case), levels_of(case)
    for i, pyramid_level in enumerate(head.reassemble_blocks(levels)):
        assert_output(case, f"reassembled{i}", pyramid_level)
    assert_output(case, "fused", head.forward_features(levels))
    assert_output(case, "out", head(levels))
    with torch.no_grad():
        assert_output(case, "out", head(levels, mapping=lambda outputs: outputs))


def test_dpt_head_in_training_mode() -> None:
    case = case_of("depth", "dpt/dd-train-bn")
    head = build_head(case)
    assert_output(case, "out", head(levels_of(case)))
    for i in range(4):
        norm = head.reassemble_blocks.batchnorm_layers[i]
        assert int(norm.num_batches_tracked) == case["expected"]["num_batches_tracked"]
        for statistic in ("running_mean", "running_var"):
            if f"{statistic}{i}" in case["outputs"]:
                assert_output(case, f"{statistic}{i}", getattr(norm, statistic))


def test_initialisation_of_a_dpt_head() -> None:
    case = case_of("depth", "dpt/init-std")
    torch.manual_seed(0)
    state = golden.target(case["build"]["class"])(**case["build"]["kwargs"]).state_dict()
    for name, want in case["expected"]["std"].items():
        assert state[name].std().item() == pytest.approx(want, rel=0.1), name
        assert abs(state[name].mean().item()) < 0.05 * want
    assert all(not state[name].any() for name in case["expected"]["zero_bias"])


@by_id("depth", "linear-head/")
def test_linear_head(case: dict[str, Any]) -> None:
    head, levels = build_head(case), levels_of(case)
    assert_output(case, "out", head(levels))
    if "predict" in case["outputs"]:
        assert_output(case, "predict", head.predict(levels, rescale_to=case["outputs"]["predict"]["shape"][-2:]))
    if "expected" in case:
        shapes = {name: list(entry.shape) for name, entry in head.state_dict().items()}
        assert_expected(case, shapes, case["expected"]["state_dict"])


@by_id(
    "depth",
    *(f"features-to-depth/{name}" for name in ("linear", "log", "chmv2_mixlog", "one-channel", "hub")),
)
def test_features_to_depth(case: dict[str, Any]) -> None:
    module = golden.target(case["build"]["class"])(**case["build"]["kwargs"])
    for name in case["inputs"]:
        assert_output(case, name.removeprefix("x").removeprefix("_") or "out", module(make_input(case, name)))


@pytest.mark.parametrize(
    ("name", "arguments"), {"mixlog_96_256": (0.001, 96.0, 256), "mixlog_80_7": (0.01, 80.0, 7)}.items()
)
def test_mixed_bins(name: str, arguments: tuple[float, float, int]) -> None:
    case = case_of("depth", "features-to-depth/mixlog-bins")
    assert_output(case, name, create_chmv2_mixlog_bins(*arguments, "cpu"))


@pytest.mark.parametrize("name", FLOAT32_DEPTHERS)
@pytest.mark.parametrize("grad", [True, False])
def test_depther(name: str, grad: bool) -> None:
    case = case_of("depth", f"depther/{name}")
    depther = build_depther(case)
    with torch.set_grad_enabled(grad):
        for output, image in zip(sorted(case["outputs"]), images_of(case), strict=True):
            assert_output(case, output, depther(image))
    if "expected" in case:
        assert depther.encoder.embed_dims == case["expected"]["embed_dims"]


@pytest.mark.parametrize("grad", [True, False])
def test_depther_in_bfloat16_is_nearer_to_the_truth_than_the_published_one(grad: bool) -> None:
    truth, case = case_of("depth", "depther/dd"), case_of("depth", "depther/dd-bf16")
    entry, tolerance = case["outputs"]["depth0"], case["tol"]
    with torch.set_grad_enabled(grad):
        depth = build_depther(case, autocast_dtype=torch.bfloat16)(make_input(case, "x0")).detach()
    assert depth.dtype == torch.float32 and list(depth.shape) == entry["shape"]
    part, stored = depth[:, :, ::2, ::3], golden.tensors("depth")
    released, exact = stored[entry["key"]].float(), stored[truth["outputs"]["depth0"]["key"]]
    torch.testing.assert_close(part, released, rtol=tolerance["rtol"], atol=tolerance["atol"])
    ours, theirs = (part - exact).abs(), (released - exact).abs()
    assert ours.mean() <= 0.5 * theirs.mean()
    assert ours.square().mean() <= 0.5 * theirs.square().mean()


def test_gradients() -> None:
    case = case_of("depth", "depther/grad")
    depther = build_depther(case)
    depther(make_input(case, "x")).mean().backward()
    gradients = {f"grad_{name}": parameter.grad for name, parameter in depther.decoder.named_parameters()}
    for name in case["outputs"]:
        assert_output(case, name, gradients[name])
    trainable = [parameter for parameter in depther.encoder.parameters() if parameter.requires_grad]
    assert len(trainable) == case["expected"]["trainable_backbone_parameters"]


@pytest.mark.parametrize("entry", ["dinov3_vit7b16_dd", "dinov3_vitl16_chmv2"])
def test_configuration_of_a_published_depther(entry: str) -> None:
    config = config_of(entry)
    for name, want in HUB[entry].items():
        value = getattr(config, name)
        assert (value.name if name == "adapt_to_patch_size" else value) == want, name


def test_depth_range_of_a_published_depther() -> None:
    depther = dinov3_vit7b16_dd(pretrained=False, device="meta", depth_range=(0.01, 20.0))
    to_depth = depther.features_to_depth
    assert {"min_depth": to_depth.min_depth, "max_depth": to_depth.max_depth} == HUB[
        "dinov3_vit7b16_dd(depth_range=(0.01, 20.0))"
    ]


def test_addresses_of_published_heads() -> None:
    urls = [load["head_url"] for load in HUB["default_loads"] if "head_url" in load]
    assert [SYNTHMIX.url(), CHMV2.url()] == urls


@pytest.mark.parametrize(
    ("entry", "n_parameters"), [(dinov3_vit7b16_dd, 230_687_776), (dinov3_vitl16_chmv2, 33_747_200)]
)
def test_state_dict_of_a_published_depther(entry: Any, n_parameters: int) -> None:
    depther = entry(pretrained=False, device="meta")
    assert all(tensor.is_meta for tensor in depther.state_dict().values())
    assert_matches_manifest(depther, entry.__name__)
    assert_matches_manifest(depther.decoder, f"{entry.__name__}_decoder")
    assert sum(parameter.numel() for parameter in depther.decoder.parameters()) == n_parameters


def test_state_dict_with_the_other_published_backbone() -> None:
    depther = dinov3_vitl16_chmv2(pretrained=False, device="meta", backbone_weights="LVD1689M")
    names = {name for name in read_manifest("dinov3_vitl16_chmv2") if "local_cls_norm" not in name}
    assert set(depther.state_dict()) == names and len(names) == 436


def test_state_dict_of_the_linear_depther_of_nyu() -> None:
    with torch.device("meta"):
        backbone = backbones.dinov3_vits16(pretrained=False)
        config = golden.target("dinov3.eval.depth.models.DecoderConfig")(backbone_out_layers="LAST", use_batchnorm=True)
        depther = golden.target("dinov3.eval.depth.models.make_depther_from_config")(backbone, config)
    assert_matches_manifest(depther, "depth_linear_vits16")
