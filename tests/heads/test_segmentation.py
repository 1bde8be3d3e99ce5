from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.heads.backbone_layers import BackboneLayersSet
from dinov3.heads.linear import LinearSegmentationHead
from dinov3.heads.segmentation import FeatureDecoder, build_segmentation_decoder
from dinov3.models.convnext import ConvNeXt
from tests.parity import deterministic
from tests.parity.dense import tiny_vit

K = 6


def vit(**overrides: Any) -> nn.Module:
    return tiny_vit("segmentation", **overrides)


def convnext(**kwargs: Any) -> nn.Module:
    model = ConvNeXt(depths=[1, 1, 2, 1], dims=[8, 12, 16, 20], **kwargs)
    model.init_weights()
    return model.eval()


def build(backbone: nn.Module | None = None, *args: Any, **kwargs: Any) -> FeatureDecoder:
    model = build_segmentation_decoder(backbone or vit(), *args, **{"num_classes": K, **kwargs})
    deterministic.fill_(model, 5)
    return model.eval()


def images_of(*shape: int) -> Tensor:
    return deterministic.tensor("image", shape, 1)


@pytest.mark.parametrize(
    ("layers", "indices"),
    [
        (BackboneLayersSet.LAST, [7]),
        ("FOUR_LAST", [4, 5, 6, 7]),
        ([2, 6], [2, 6]),
        ((6, 2), [2, 6]),
    ],
)
def test_levels_are_chosen_by_set_name_or_list(layers: Any, indices: list[int]) -> None:
    backbone, x = vit(), images_of(2, 3, 32, 48)
    model = build(backbone, layers)
    levels = backbone.get_intermediate_layers(x, n=indices, reshape=True)
    assert model.segmentation_model[1].conv.in_channels == 48 * len(indices)
    torch.testing.assert_close(model(x), model.segmentation_model[1](levels))


def test_four_even_intervals_are_the_default() -> None:
    assert build().segmentation_model[0].n == [1, 3, 5, 7]


@pytest.mark.parametrize("patch_size", [None, 16])
@pytest.mark.parametrize(
    ("layers", "width"), [("FOUR_EVEN_INTERVALS", 56), ("FOUR_LAST", 56), ("LAST", 20), ([3, 1], 32)]
)
def test_stages_of_a_convnext_have_their_own_widths(layers: Any, width: int, patch_size: int | None) -> None:
    model = build(convnext(patch_size=patch_size), layers)
    out = model(images_of(1, 3, 64, 96))
    assert model.segmentation_model[1].conv.in_channels == width
    first_stride = 2 ** (2 + model.segmentation_model[0].n[0]) if patch_size is None else patch_size
    assert out.shape == (1, K, 64 // first_stride, 96 // first_stride) and out.isfinite().all()
    assert model.predict(images_of(1, 3, 64, 96), (64, 96)).shape == (1, K, 64, 96)


def test_only_the_head_learns_and_the_backbone_stays_in_evaluation_mode() -> None:
    backbone = vit().train()
    model = build(backbone, "LAST", dropout=0.5)
    for _ in range(2):
        model.train()
        assert model.segmentation_model[1].training and model.segmentation_model[1].batchnorm_layer.training
        assert not any(module.training for module in backbone.modules())
        model.segmentation_model.train()
        assert not any(module.training for module in backbone.modules())
    model(images_of(2, 3, 32, 48)).square().sum().backward()
    for name, parameter in model.named_parameters():
        is_head = name.startswith("segmentation_model.1.")
        assert parameter.requires_grad == is_head == (parameter.grad is not None), name
    assert int(model.segmentation_model[1].batchnorm_layer.num_batches_tracked) == 1


def test_predict_is_the_forward_resized_without_dropout() -> None:
    model, x = build(None, "FOUR_LAST", dropout=0.9), images_of(2, 3, 32, 48)
    want = F.interpolate(model(x), (33, 50), mode="bilinear", align_corners=False)
    model.segmentation_model[1].dropout.train()
    got = model.predict(x, (33, 50))
    torch.testing.assert_close(got, want)
    assert got.is_inference() and model.predict(x).shape == (2, K, 512, 512)


def test_head_follows_its_options() -> None:
    backbone, x = vit(), images_of(2, 3, 32, 48)
    with_class = build(backbone, "LAST", use_cls_token=True)
    level = backbone.get_intermediate_layers(x, n=[7], reshape=True, return_class_token=True)
    torch.testing.assert_close(with_class(x), with_class.segmentation_model[1](level))
    assert with_class.segmentation_model[1].conv.in_channels == 96

    unnormed = build(backbone, "LAST", use_backbone_norm=False)
    level = backbone.get_intermediate_layers(x, n=[7], reshape=True, norm=False)
    torch.testing.assert_close(unnormed(x), unnormed.segmentation_model[1](level))
    assert (unnormed(x) - build(backbone, "LAST")(x)).abs().max() > 0.1

    assert build(backbone, "LAST", dropout=0.3).segmentation_model[1].dropout.p == 0.3
    plain = build(backbone, "LAST", use_batchnorm=False)
    assert [name for name in plain.state_dict() if ".1." in name[:21]] == [
        "segmentation_model.1.conv.weight",
        "segmentation_model.1.conv.bias",
    ]


def test_autocast_is_that_of_the_images_device() -> None:
    backbone, x = vit(), images_of(1, 3, 32, 48)
    half, single = build(backbone, "LAST", autocast_dtype=torch.bfloat16), build(backbone, "LAST")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert half(x).dtype == half.predict(x).dtype == torch.bfloat16
        want = single(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = single(x)
    assert got.dtype == torch.float32 and torch.equal(got, want)
    torch.testing.assert_close(half(x).float(), want, rtol=0.1, atol=0.1)


def test_a_context_of_ones_own_is_entered() -> None:
    entered = []

    @contextlib.contextmanager
    def context() -> Any:
        entered.append(True)
        yield

    parts = nn.ModuleList([nn.Identity(), LinearSegmentationHead([3], K)])
    model = FeatureDecoder(parts, context)
    model.segmentation_model[0] = AsOneLevel()
    model(images_of(2, 3, 8, 8))
    model.predict(images_of(2, 3, 8, 8))
    assert len(entered) == 2


class AsOneLevel(nn.Module):
    """Means of patches of 16 pixels as the only level; of smaller images, the image."""

    def __init__(self, patch_size: int = 1) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        return [F.avg_pool2d(x, self.patch_size)]


def test_a_model_is_made_on_the_device_of_its_backbone_and_can_be_copied() -> None:
    with torch.device("meta"):
        backbone = vit()
    model = build_segmentation_decoder(backbone, num_classes=K)
    assert all(entry.is_meta for entry in model.state_dict().values())
    assert model(images_of(1, 3, 32, 48).to("meta")).shape == (1, K, 2, 3)
    original, x = build(None, "LAST", autocast_dtype=torch.bfloat16), images_of(1, 3, 32, 48)
    assert torch.equal(copy.deepcopy(original)(x), original(x))


def test_unpadded_odd_images_lose_their_last_rows_and_columns() -> None:
    model, x = build(None, "LAST"), images_of(1, 3, 59, 70)
    torch.testing.assert_close(model.predict(x, (59, 70)), model.predict(x[:, :, :48, :64], (59, 70)))
    assert model(x).shape == (1, K, 3, 4)


@pytest.mark.parametrize("make_backbone", [vit, convnext])
def test_padded_images_are_seen_whole_and_cut_back(make_backbone: Any) -> None:
    backbone = make_backbone()
    multiple = 32 if make_backbone is convnext else 16
    model, padded = build(backbone, "LAST"), build(backbone, "LAST", pad_to_patch_multiple=True)
    x = images_of(2, 3, 59, 70)
    rows, columns = -59 % multiple, -70 % multiple
    framed = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    whole = model.predict(framed, framed.shape[-2:])
    want = whole[:, :, rows // 2 : rows // 2 + 59, columns // 2 : columns // 2 + 70]
    torch.testing.assert_close(padded.predict(x, (59, 70)), want)
    resized = F.interpolate(want, (30, 41), mode="bilinear", align_corners=False)
    torch.testing.assert_close(padded.predict(x, (30, 41)), resized)
    # Training sees images as published.
    assert torch.equal(padded(x), model(x))
    assert padded.state_dict().keys() == model.state_dict().keys()


def test_padding_changes_nothing_where_sides_are_multiples() -> None:
    backbone, x = vit(), images_of(1, 3, 32, 48)
    padded = build(backbone, "LAST", pad_to_patch_multiple=True)
    assert torch.equal(padded.predict(x, (20, 30)), build(backbone, "LAST").predict(x, (20, 30)))


def test_padding_puts_every_pixel_where_it_is() -> None:
    # The head repeats the first channel, a ramp over the columns: its prediction should be that ramp.
    head = LinearSegmentationHead([3], 1, use_batchnorm=False)
    with torch.no_grad():
        head.conv.weight.copy_(torch.tensor([1.0, 0.0, 0.0])[None, :, None, None])
    ramp = torch.arange(90.0).expand(1, 3, 64, 90)
    errors = {}
    for patch_multiple in (1, 16):
        model = FeatureDecoder(nn.ModuleList([AsOneLevel(16), head]), patch_multiple=patch_multiple)
        difference = (model.predict(ramp, (64, 90)) - ramp[:, :1])[..., 24:66].abs()  # between patches without zeros
        errors[patch_multiple] = difference.max().item()
    assert errors[16] < 1e-3 < 4 < errors[1]


def test_other_decoders_are_refused() -> None:
    with pytest.raises(ValueError, match="decoder_type='lineer': expected 'linear' or 'm2f'"):
        build_segmentation_decoder(vit(), decoder_type="lineer")
    with pytest.raises(TypeError, match="LinearSegmentationHead does not know ffn_dim=64"):
        build_segmentation_decoder(vit(), ffn_dim=64)


def test_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="LAS.*LAST, FOUR_LAST, FOUR_EVEN_INTERVALS"):
        build_segmentation_decoder(vit(), "LAS")
    with pytest.raises(ValueError, match=r"8 blocks.*got \[3, 8\]"):
        build_segmentation_decoder(vit(), [3, 8])
