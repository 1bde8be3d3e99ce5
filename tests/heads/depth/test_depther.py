"""Whole depthers: precision, memory, predictions without padding, and checkpoints of heads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.heads.backbone_layers import BackboneLayersSet
from dinov3.heads.depth.depther import DecoderConfig, Depther, build_depther, make_depther_from_config, make_head
from dinov3.heads.depth.dpt import DPTHead
from dinov3.heads.depth.encoder import PatchSizeAdaptationStrategy
from dinov3.heads.linear import LinearDepthHead
from tests.heads.tiny import CONFIGS, images, tiny_backbone, tiny_depther


class SeesPixels(nn.Module):
    """Stands for a backbone of patches of 16: its map holds the means of the 4 x 4 squares of each patch."""

    patch_size = 16
    n_blocks = 4
    embed_dim = 16

    def get_intermediate_layers(self, x: Tensor, *, n: list[int], **options: Any) -> list[tuple[Tensor, Tensor]]:
        height, width = (side // 16 * 16 for side in x.shape[-2:])  # A ViT sees whole patches.
        squares = F.avg_pool2d(x[..., :height, :width].mean(1, keepdim=True), 4)
        patches = F.pixel_unshuffle(squares, 4)  # [B, 16, h, w]
        return [(patches, patches.mean((2, 3)))] * len(n)


def linear_that_averages() -> Depther:
    """Its depth is the mean brightness of a patch."""
    depther = build_depther(SeesPixels(), "LAST", 1, head_type="linear", min_depth=0.0)
    nn.init.constant_(depther.decoder.conv_depth.weight, 1 / 16)
    return depther


def dpt_that_passes_on() -> Depther:
    """Its depth is the brightness of squares of 4 x 4 pixels, which the shallowest level brings, through a DPT head."""
    depther = build_depther(
        SeesPixels(),
        "FOUR_LAST",
        1,
        min_depth=0.0,
        channels=2,
        post_process_channels=[16, 1, 1, 1],
        n_hidden_channels=1,
        projection_after_fusion=False,
    )
    head: Any = depther.decoder
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        blocks = head.reassemble_blocks
        blocks.projects[0].conv.weight[:, :, 0, 0] = torch.eye(16)
        for i in range(16):
            blocks.resize_layers[0].weight[i, 0, i // 4, i % 4] = 1
        head.convs[0].conv.weight[0, 0, 1, 1] = 1
        head.fusion_blocks[3].project.conv.weight[0, 0] = 1
        for i in (0, 2, 4):
            centre = head.conv_depth.head[i].weight.shape[-1] // 2
            head.conv_depth.head[i].weight[0, 0, centre, centre] = 1
    return depther


def ramp(height: int, width: int, *, along: str) -> Tensor:
    """An image [1, 3, height, width] whose brightness is the row or column of the pixel."""
    rows, columns = torch.arange(height).float()[:, None], torch.arange(width).float()[None]
    return (rows if along == "rows" else columns).expand(1, 3, height, width).clone()


# Predictions without padding.


@pytest.mark.parametrize("strategy", list(PatchSizeAdaptationStrategy))
@pytest.mark.parametrize(("make", "tolerance"), [(linear_that_averages, 1e-3), (dpt_that_passes_on, 1.0)])
@pytest.mark.parametrize("along", ["rows", "columns"])
def test_prediction_lines_up_with_the_image(make: Any, tolerance: float, along: str, strategy: Any) -> None:
    # 100 pixels are 7 patches, an odd number, with 6 pixels of padding on either side.
    depther = make()
    depther.encoder = type(depther.encoder)(SeesPixels(), depther.encoder.backbone_out_indices, False, strategy)
    image = ramp(100, 100, along=along)
    depth = depther.predict(image)
    assert depth.shape == (1, 1, 100, 100)
    # Away from the border, where patches average zeros of the padding. A DPT head squeezes by up to 1.2 pixels itself,
    # because it upsamples with aligned corners.
    inside = (..., slice(24, 76), slice(24, 76))
    torch.testing.assert_close(depth[inside], image[:, :1][inside], rtol=0, atol=tolerance)
    if strategy is PatchSizeAdaptationStrategy.CENTER_PADDING:
        stretched = F.interpolate(depther(image), size=(100, 100), mode="bilinear")
        assert (stretched - image[:, :1])[inside].abs().max() > 2


def test_prediction_of_even_numbers_of_patches_cuts_pixels() -> None:
    depther = tiny_depther("dd")
    image = images(60, 90)
    with torch.no_grad():
        whole = depther(image)
        assert whole.shape[-2:] == (64, 96)
        torch.testing.assert_close(depther.predict(image), whole[..., 2:62, 3:93])


def test_prediction_of_odd_numbers_of_patches_squeezes_and_cuts() -> None:
    depther, image = tiny_depther("chmv2"), images(70, 100)
    with torch.no_grad():
        whole = depther(image)
        assert whole.shape[-2:] == (96, 128)
        padded = F.interpolate(whole, size=(80, 112), mode="bilinear", align_corners=False)
        torch.testing.assert_close(depther.predict(image), padded[..., 5:75, 6:106])
        smaller = F.interpolate(padded[..., 5:75, 6:106], size=(35, 50), mode="bilinear", align_corners=False)
        torch.testing.assert_close(depther.predict(image, rescale_to=(35, 50)), smaller)


def test_prediction_without_padding_is_resized_once() -> None:
    depther, image = tiny_depther("linear"), images(64, 96)
    want = F.interpolate(depther(image), size=(64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(depther.predict(image), want)
    stretching = tiny_depther("linear", adapt_to_patch_size="STRETCH")
    want = F.interpolate(stretching(images(50, 71)), size=(9, 11), mode="bilinear", align_corners=False)
    torch.testing.assert_close(stretching.predict(images(50, 71), (9, 11)), want)


# Precision and memory.


@pytest.mark.parametrize("kind", CONFIGS)
def test_float32_is_float32_under_an_outer_autocast(kind: str) -> None:
    depther = tiny_depther(kind)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            want = depther(images())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                depth = depther(images())
        assert depth.dtype == torch.float32 and torch.equal(depth, want)
    assert want.unique().numel() > 0.9 * want.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_that_of_autocast_with_depths_in_float32(dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []
    depther = tiny_depther("dd", autocast_dtype=dtype)
    depther.decoder.convs[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    depth, want = depther(images()), tiny_depther("dd")(images())
    assert seen == [dtype] and depth.dtype == torch.float32
    assert 0 < (depth - want).abs().max() < 0.02 * want.max()


def test_autocast_is_that_of_the_images_device() -> None:
    depther = tiny_depther("dd", autocast_dtype=torch.bfloat16).to("meta")
    assert depther(images().to("meta")).shape == (1, 1, 64, 96)


def test_a_dtype_that_autocast_has_not() -> None:
    with pytest.raises(ValueError, match=r"autocast_dtype=torch.float64: expected torch.float32, torch.bfloat16"):
        tiny_depther(autocast_dtype=torch.float64)


@pytest.mark.parametrize("kind", CONFIGS)
def test_depth_is_the_same_with_and_without_gradients(kind: str) -> None:
    depther = tiny_depther(kind)
    with torch.no_grad():
        depth = depther(images(70, 100, batch=2))
    torch.testing.assert_close(depth, depther(images(70, 100, batch=2)).detach())


def test_without_gradients_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    monkeypatch.setattr("dinov3.heads.depth.dpt.BAND_SIZE", 32 * 96 * 16)
    depther = tiny_depther("dd")
    depther.features_to_depth.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[2]))
    with torch.inference_mode():
        depther(images())
    assert rows == [16, 16, 16, 16]
    depther(images())
    assert rows[4:] == [64]


def test_an_exported_depther_gives_the_same() -> None:
    # The head of "chmv2" has more branches than that of "dd".
    depther = tiny_depther("chmv2", tiny_backbone(depth=4), backbone_out_layers=[0, 1, 2, 3])
    with torch.no_grad():
        exported = torch.export.export(depther, (images(70, 100),)).module()
        torch.testing.assert_close(exported(images(70, 100)), depther(images(70, 100)), rtol=1e-5, atol=1e-5)


# Modes and gradients.


def test_backbone_stays_in_evaluation_mode_through_train() -> None:
    depther = tiny_depther("linear", use_batchnorm=False)
    before = depther(images())
    depther.train()
    assert depther.decoder.training and depther.features_to_depth.training
    assert not any(module.training for module in depther.encoder.backbone.modules())
    assert torch.equal(depther(images()), before)
    nn.ModuleList([depther]).train()
    assert torch.equal(depther(images()), before)


def test_only_the_decoder_is_trained() -> None:
    depther = tiny_depther("dd")
    depther(images()).mean().backward()
    assert all(parameter.grad is not None for parameter in depther.decoder.parameters())
    assert not any(parameter.requires_grad for parameter in depther.encoder.parameters())


def test_gradients_of_the_images() -> None:
    x = images().requires_grad_()
    tiny_depther("dd")(x).mean().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()


# Building.


def test_defaults_of_the_configuration() -> None:
    assert dataclasses.asdict(DecoderConfig()) == {
        "min_depth": 0.001,
        "max_depth": 80.0,
        "bins_strategy": "linear",
        "norm_strategy": "linear",
        "head_kwargs": {},
        "backbone_out_layers": BackboneLayersSet.FOUR_EVEN_INTERVALS,
        "adapt_to_patch_size": PatchSizeAdaptationStrategy.CENTER_PADDING,
        "use_backbone_norm": True,
        "type": "linear",
        "n_output_channels": 256,
        "use_batchnorm": False,
        "use_cls_token": False,
    }
    assert all(entry.metadata["help"] for entry in dataclasses.fields(DecoderConfig))


def test_configuration_can_be_read_by_omegaconf() -> None:
    from omegaconf import OmegaConf

    settings = {"type": "dpt", "backbone_out_layers": [1, 3, 5, 7], "adapt_to_patch_size": "STRETCH"}
    settings["head_kwargs"] = {"channels": 8, "post_process_channels": [4, 4, 4, 4]}
    config: Any = OmegaConf.merge(OmegaConf.structured(DecoderConfig), settings)
    depther = make_depther_from_config(tiny_backbone(), config)
    assert depther(images(50, 60)).shape == (1, 1, 64, 64)
    assert depther.encoder.margins(50, 60) == (0, 0, 0, 0)


def test_build_depther_is_what_the_configuration_builds() -> None:
    backbone, config = tiny_backbone(), DecoderConfig(**CONFIGS["chmv2"])
    torch.manual_seed(0)
    want = make_depther_from_config(backbone, config)
    torch.manual_seed(0)
    depther = build_depther(
        backbone,
        [1, 3, 5, 7],
        32,
        use_backbone_norm=True,
        use_cls_token=True,
        max_depth=96.0,
        bins_strategy="chmv2_mixlog",
        norm_strategy="chmv2_mixlog",
        **CONFIGS["chmv2"]["head_kwargs"],
    )
    assert torch.equal(depther(images()), want(images()))
    assert not any(module.training for module in depther.modules())


def test_heads() -> None:
    linear = make_head(8, 5)
    assert isinstance(linear, LinearDepthHead) and linear.conv_depth.weight.shape == (5, 8, 1, 1)
    assert make_head([8, 4], 5, use_batchnorm=True, use_cls_token=True).conv_depth.weight.shape == (5, 24, 1, 1)
    dpt = make_head([8] * 4, 5, head_type="dpt", channels=6, post_process_channels=[2, 2, 2, 2])
    assert isinstance(dpt, DPTHead) and dpt.reassemble_blocks.readout_type == "ignore"
    dpt = make_head([8] * 4, 5, use_cls_token=True, head_type="dpt")
    assert isinstance(dpt, DPTHead) and dpt.reassemble_blocks.readout_type == "project"


def test_unknown_heads() -> None:
    with pytest.raises(NotImplementedError, match="no depth head of type 'm2f', only linear and dpt"):
        make_head(8, 5, head_type="m2f")
    with pytest.raises(TypeError, match="a linear depth head does not take channels, use_bias"):
        make_head(8, 5, channels=3, use_bias=True)
    with pytest.raises(TypeError, match="n_hidden"):
        make_head([8] * 4, 5, head_type="dpt", n_hidden=3)
    with pytest.raises(
        ValueError, match="a DPT head takes 4 levels, but backbone_out_layers names 1: choose FOUR_LAST"
    ):
        build_depther(tiny_backbone(), "LAST", 5)


# Checkpoints of heads.


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def wrappings(depther: Depther) -> dict[str, Any]:
    head = dict(depther.decoder.state_dict())
    return {
        "bare": head,
        "training": {"model": head, "optimizer": {"state": {}, "param_groups": []}, "iteration": 3},
        "distributed": {"model": {f"module.{name}": entry for name, entry in head.items()}},
        "whole": dict(depther.state_dict()),
        "whole, distributed": {f"module.{name}": entry for name, entry in depther.state_dict().items()},
        "decoder in training": {"model": {f"decoder.{name}": entry for name, entry in head.items()}},
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpoints_of_every_kind(kind: str, tmp_path: Path) -> None:
    saved = tiny_depther(kind)
    backbone = saved.encoder.backbone
    for name, content in wrappings(saved).items():
        path = save(content, tmp_path / f"{name}.pth")
        for given in (path, str(path)):
            depther = make_depther_from_config(backbone, DecoderConfig(**CONFIGS[kind]), given)
            assert torch.equal(depther(images()), saved(images())), name
            assert all(parameter.requires_grad for parameter in depther.decoder.parameters())
            assert not depther.decoder.training


def test_training_a_loaded_head_does_not_change_the_file(tmp_path: Path) -> None:
    path = save(tiny_depther("linear").decoder.state_dict(), tmp_path / "head.pth")
    before = path.read_bytes()
    depther = make_depther_from_config(tiny_backbone(), DecoderConfig(**CONFIGS["linear"]), path)
    with torch.no_grad():
        depther.decoder.conv_depth.weight.add_(1)
    depther.train()(images())
    assert path.read_bytes() == before


def test_nothing_is_initialised_before_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tiny_depther("dd").decoder.state_dict(), tmp_path / "head.pth")
    backbone = tiny_backbone()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("initialised")

    monkeypatch.setattr(nn.init, "kaiming_normal_", fail)
    make_depther_from_config(backbone, DecoderConfig(**CONFIGS["dd"]), path)


def other_heads() -> dict[str, tuple[Any, str]]:
    dd, linear = (dict(tiny_depther(kind).decoder.state_dict()) for kind in ("dd", "linear"))
    without = {name: entry for name, entry in dd.items() if name != "project.conv.bias"}
    wide = {**dd, "conv_depth.head.4.bias": torch.zeros(7)}
    dpt = r"a DPT head with levels of 32, 32, 32, 32 channels, 12 channels inside and 32 outputs \(68 entries\)"
    return {
        "linear": (linear, rf"expected {dpt}, found a linear depth head with 32 channels and 16 outputs \(7 entries\)"),
        "without": (without, r"1 missing \(project.conv.bias\)\.$"),
        "with": ({**dd, "more": torch.zeros(1)}, r"1 unknown \(more\)\.$"),
        "wide": (wide, r"1 of another shape \(conv_depth.head.4.bias is \[7\], expected \[32\]\)\.$"),
        "number": ({**dd, "project.conv.bias": 3}, r"1 of another type \(project.conv.bias is int\)\.$"),
        "backbone": (dict(tiny_backbone().state_dict()), r"found a backbone \(\d+ entries\)"),
        "nothing": ({}, "found nothing; 68 missing"),
    }


@pytest.mark.parametrize("name", other_heads())
def test_weights_of_another_head(name: str, tmp_path: Path) -> None:
    content, message = other_heads()[name]
    path = save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"^{path} does not fit the dpt head of the config: .*{message}"):
        make_depther_from_config(tiny_backbone(), DecoderConfig(**CONFIGS["dd"]), path)


def test_files_that_hold_no_head(tmp_path: Path) -> None:
    config, backbone = DecoderConfig(**CONFIGS["dd"]), tiny_backbone()
    path = save(tiny_depther("dd").decoder.state_dict(), tmp_path / "head.pth")
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(path.read_bytes()[:-3000])
    page = tmp_path / "page.pth"
    page.write_text("<html>Forbidden</html>")
    for given, message in (
        (truncated, "truncated.pth is truncated"),
        (page, "page.pth is not a checkpoint: it is a web page"),
        (tmp_path, "is a directory: expected the file of a head's weights"),
    ):
        with pytest.raises(ValueError, match=message):
            make_depther_from_config(backbone, config, given)
    with pytest.raises(FileNotFoundError, match=r"no weights at none.pth"):
        make_depther_from_config(backbone, config, "none.pth")
