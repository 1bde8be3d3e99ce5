"""The DPT head, beside a plain writing of its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.heads.depth import dpt
from dinov3.heads.depth.dpt import DPTHead
from tests.heads.tiny import randomise_

SMALL: dict[str, Any] = {
    "in_channels": [6, 6, 6, 6],
    "channels": 8,
    "post_process_channels": [4, 5, 6, 7],
    "n_output_channels": 5,
    "n_hidden_channels": 6,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "ignore": {"readout_type": "ignore", "use_batchnorm": True},
    "add": {"readout_type": "add", "use_bias": True},
    "project": {"readout_type": "project", "use_bias": True, "projection_after_fusion": False},
    "project with batch norm": {"readout_type": "project", "use_batchnorm": True},
}


def make_head(**kwargs: Any) -> DPTHead:
    torch.manual_seed(0)
    head = DPTHead(**{**SMALL, **kwargs}).eval()
    randomise_(head)
    return head


def levels(height: int = 4, width: int = 3, batch: int = 2, channels: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((batch, channels, height, width), (batch, channels))
    return [tuple(torch.randn(size, generator=generator) for size in sizes) for _ in range(4)]  # type: ignore[misc]


def by_definition(head: Any, features: list[tuple[Tensor, Tensor]], variant: dict[str, Any]) -> Tensor:
    """Convolutions at full resolution, tokens repeated and concatenated, no order changed."""

    def residual(unit: Any, x: Tensor) -> Tensor:
        return x + unit.conv2.conv(F.relu(unit.conv1.conv(F.relu(x))))

    def double(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    blocks, pyramid = head.reassemble_blocks, []
    for i, (patches, token) in enumerate(features):
        repeated = token[:, :, None, None].expand_as(patches)
        if variant["readout_type"] == "add":
            patches = patches + repeated
        elif variant["readout_type"] == "project":
            both = torch.cat([patches, repeated], dim=1).movedim(1, -1)
            patches = blocks.readout_projects[i](both).movedim(-1, 1)
        if variant.get("use_batchnorm"):
            patches = blocks.batchnorm_layers[i](patches)
        pyramid.append(head.convs[i].conv(blocks.resize_layers[i](blocks.projects[i].conv(patches))))
    x = None
    for block, skip in zip(head.fusion_blocks, reversed(pyramid), strict=True):
        if x is None:
            x = skip
        else:
            skip = F.interpolate(skip, size=x.shape[-2:], mode="bilinear", align_corners=False)
            x = x + residual(block.res_conv_unit1, skip)
        x = block.project.conv(double(residual(block.res_conv_unit2, x)))
    assert x is not None
    if variant.get("projection_after_fusion", True):
        x = F.relu(head.project.conv(x))
    return head.conv_depth.head(x)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("size", [(4, 2), (5, 3), (1, 1)])
def test_outputs_are_those_of_the_definition(variant: dict[str, Any], size: tuple[int, int]) -> None:
    head, features = make_head(**variant), levels(*size)
    want = by_definition(head, features, variant)
    torch.testing.assert_close(head(features), want, rtol=1e-4, atol=1e-5)
    assert want.shape == (2, 5, 32 * -(-size[0] // 2), 32 * -(-size[1] // 2))


def test_gradients_are_those_of_the_definition() -> None:
    variant, gradients = VARIANTS["project with batch norm"], []
    for forward in (lambda head, x: head(x), lambda head, x: by_definition(head, x, variant)):
        head = make_head(**variant).double()
        features = [(p.double().requires_grad_(), t.double().requires_grad_()) for p, t in levels()]
        forward(head, features).square().mean().backward()
        gradients.append([p.grad for p in head.parameters()] + [part.grad for level in features for part in level])
    for ours, want in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, want)


def test_features_are_not_changed() -> None:
    head, features = make_head(**VARIANTS["ignore"]), levels()
    head(features)
    for level, fresh in zip(features, levels(), strict=True):
        assert torch.equal(level[0], fresh[0]) and torch.equal(level[1], fresh[1])


def test_names_of_entries() -> None:
    names = set(make_head(**VARIANTS["ignore"]).state_dict())
    assert {
        "reassemble_blocks.projects.3.conv.bias",
        "reassemble_blocks.resize_layers.0.weight",
        "reassemble_blocks.resize_layers.3.bias",
        "reassemble_blocks.batchnorm_layers.2.num_batches_tracked",
        "convs.1.conv.weight",
        "fusion_blocks.0.res_conv_unit2.conv1.conv.weight",
        "fusion_blocks.3.res_conv_unit1.conv2.conv.weight",
        "fusion_blocks.2.project.conv.bias",
        "project.conv.weight",
        "conv_depth.head.4.bias",
    } <= names
    absent = (
        "resize_layers.2",
        "readout_projects",
        "fusion_blocks.0.res_conv_unit1",
        "convs.0.conv.bias",
        "conv1.conv.bias",
    )
    assert not [name for name in names if any(part in name for part in absent)]
    names = set(make_head(**VARIANTS["project"]).state_dict())
    assert "reassemble_blocks.readout_projects.0.0.weight" in names
    assert "fusion_blocks.1.res_conv_unit1.conv1.conv.bias" in names
    assert not [name for name in names if name.startswith(("project.", "reassemble_blocks.batchnorm"))]


def test_defaults() -> None:
    with torch.device("meta"):
        head = DPTHead()
    shapes = {name: list(entry.shape) for name, entry in head.state_dict().items()}
    assert shapes["reassemble_blocks.readout_projects.3.0.weight"] == [1024, 2048]
    assert shapes["conv_depth.head.2.weight"] == [32, 128, 3, 3] and shapes["conv_depth.head.4.weight"][0] == 256
    assert shapes["convs.0.conv.weight"] == [256, 128, 3, 3] and "project.conv.weight" in shapes


@pytest.mark.parametrize("band_size", [1, 500, 10**9])
def test_bands_of_rows_give_what_the_whole_gives(band_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head, features, seen = make_head(**VARIANTS["add"]), levels(4, 3), []
    monkeypatch.setattr(dpt, "BAND_SIZE", band_size)

    def mapping(outputs: Tensor) -> Tensor:
        seen.append(outputs.shape[2])
        return outputs.amax(dim=1, keepdim=True)

    with torch.no_grad():
        torch.testing.assert_close(head(features, mapping=mapping), head(features).amax(dim=1, keepdim=True))
    assert sum(seen) == 64 and len(seen) == {1: 64, 500: 64, 10**9: 1}[band_size]


def test_logits_are_in_float32_under_autocast() -> None:
    head, features = make_head(**VARIANTS["project"]), levels()
    want = head(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = head(features)
    assert got.dtype == torch.float32 and not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.05 * want.abs().max().item())


def test_a_head_of_bfloat16_computes_in_it() -> None:
    head = make_head(**VARIANTS["ignore"]).bfloat16()
    assert head([(p.bfloat16(), t.bfloat16()) for p, t in levels()]).dtype == torch.bfloat16


def test_batch_norms_of_training_see_the_batch() -> None:
    head = make_head(**VARIANTS["ignore"]).train()
    norm: Any = head.reassemble_blocks.batchnorm_layers[1]
    before = norm.running_mean.clone()
    head(levels())
    want = 0.9 * before + 0.1 * levels()[1][0].mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, want)


@pytest.mark.parametrize("n_levels", [3, 5])
def test_another_number_of_levels(n_levels: int) -> None:
    with pytest.raises(ValueError, match=f"takes 4 levels of .map, class token., but was given {n_levels}"):
        make_head()((levels() + levels())[:n_levels])
    for option in ("in_channels", "post_process_channels"):
        with pytest.raises(ValueError, match=rf"{option}=\[6.*\]: a DPT head has 4 levels, got {n_levels}"):
            make_head(**{option: [6] * n_levels})


@pytest.mark.parametrize("readout", ["add", "project"])
def test_missing_class_token(readout: str) -> None:
    bare: Any = [(patches,) for patches, _ in levels()]
    with pytest.raises(ValueError, match=f"readout_type='{readout}' needs the class token of level 0"):
        make_head(readout_type=readout)(bare)
    assert make_head(readout_type="ignore")(bare).shape == (2, 5, 64, 64)


def test_unknown_arguments() -> None:
    with pytest.raises(
        ValueError, match=r"readout_type='projct' \(did you mean 'project'\?\): choose one of ignore, add"
    ):
        make_head(readout_type="projct")
    for name in ("expand_channels", "n_hidden"):
        with pytest.raises(TypeError, match=name):
            make_head(**{name: False})


def test_nothing_is_initialised_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("initialised")

    monkeypatch.setattr(nn.init, "kaiming_normal_", fail)
    with torch.device("meta"):
        DPTHead(**SMALL)
