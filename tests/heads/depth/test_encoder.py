"""The frozen backbone under a dense head."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from dinov3.heads.depth.encoder import DinoVisionTransformerWrapper, PatchSizeAdaptationStrategy
from dinov3.models.convnext import ConvNeXt
from tests.heads.tiny import images, tiny_backbone


def test_backbone_stays_in_evaluation_mode() -> None:
    encoder = DinoVisionTransformerWrapper(tiny_backbone().train(), "LAST")
    model = nn.ModuleDict({"encoder": encoder, "decoder": nn.BatchNorm2d(1)})
    for mode in (False, True):
        assert model.train(mode) is model
        assert not any(module.training for module in encoder.backbone.modules())
        assert encoder.training == mode == model["decoder"].training
    (first, _), (second, _) = encoder(images())[0], encoder(images())[0]
    assert torch.equal(first, second)


def test_backbone_is_frozen_and_builds_no_graph() -> None:
    encoder = DinoVisionTransformerWrapper(tiny_backbone(), "FOUR_LAST")
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(part.grad_fn is None for level in encoder(images()) for part in level)


def test_gradients_of_the_images_go_through() -> None:
    encoder, x = DinoVisionTransformerWrapper(tiny_backbone(), "LAST"), images().requires_grad_()
    encoder(x)[0][0].square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_levels_come_shallow_to_deep_with_their_widths() -> None:
    backbone = tiny_backbone()
    encoder = DinoVisionTransformerWrapper(backbone, [7, 1], use_backbone_norm=True)
    assert encoder.backbone_out_indices == [7, 1] and encoder.embed_dims == [32, 32] and encoder.final_norm
    want = backbone.get_intermediate_layers(images(), n=[1, 7], reshape=True, return_class_token=True, norm=True)
    for (patches, token), (want_patches, want_token) in zip(encoder(images()), want, strict=True):
        assert torch.equal(patches, want_patches) and torch.equal(token, want_token)
        assert patches.shape == (1, 32, 4, 6) and token.shape == (1, 32)


def test_final_norm_is_optional() -> None:
    backbone = tiny_backbone()
    normed, plain = (DinoVisionTransformerWrapper(backbone, "LAST", use_backbone_norm=norm) for norm in (True, False))
    assert not torch.allclose(normed(images())[0][0], plain(images())[0][0])


def test_convnext_has_widths_of_its_own_and_needs_multiples_of_its_stem() -> None:
    backbone = ConvNeXt(depths=[1, 1, 1, 1], dims=[4, 6, 8, 10], patch_size=16)
    backbone.init_weights()
    encoder = DinoVisionTransformerWrapper(backbone, [3, 0])
    assert encoder.embed_dims == [4, 10]
    assert encoder.patch_size_adapter(images(50, 61)).shape == (1, 3, 52, 64)
    assert [patches.shape[1] for patches, _ in encoder(images(64, 64))] == [4, 10]


@pytest.mark.parametrize(
    ("strategy", "shape", "margins"),
    [
        ("CENTER_PADDING", (4, 5), (7, 7, 4, 5)),
        ("STRETCH", (4, 5), (0, 0, 0, 0)),
        ("NO_ADAPTATION", (3, 4), (0, -2, 0, -7)),
    ],
)
def test_images_of_other_sizes(strategy: str, shape: tuple[int, int], margins: tuple[int, ...]) -> None:
    member = PatchSizeAdaptationStrategy[strategy]
    for given in (member, strategy, member.value):
        encoder = DinoVisionTransformerWrapper(tiny_backbone(), "LAST", adapt_to_patch_size=given)
        assert encoder(images(50, 71))[0][0].shape[-2:] == shape
        assert encoder.margins(50, 71) == margins
        assert not any(encoder.margins(48, 64))


def test_unknown_strategy() -> None:
    with pytest.raises(
        ValueError, match=r"adapt_to_patch_size='streched' \(did you mean 'STRETCH'\?\): choose one of CENTER_PADDING,"
    ):
        DinoVisionTransformerWrapper(tiny_backbone(), "LAST", adapt_to_patch_size="streched")


def test_names_and_values_of_strategies() -> None:
    assert {member.name: member.value for member in PatchSizeAdaptationStrategy} == {
        "CENTER_PADDING": "center_padding",
        "STRETCH": "stretch",
        "NO_ADAPTATION": "never",
    }


def test_a_vit_causes_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        DinoVisionTransformerWrapper(tiny_backbone(), "LAST")
    assert not caplog.records
