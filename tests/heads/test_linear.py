"""The linear heads of depth and segmentation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.heads.linear import LinearDepthHead, LinearSegmentationHead


def levels(*widths: int, size: tuple[int, int] = (3, 4), batch: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(batch, c, *size, generator=generator), torch.randn(batch, c, generator=generator)) for c in widths
    ]


def test_depth_head_appends_each_class_token_to_its_level() -> None:
    head = LinearDepthHead([2, 3], 5)
    (p0, c0), (p1, c1) = features = levels(2, 3)
    tokens = torch.cat(
        [p0, c0[:, :, None, None].expand(-1, -1, 3, 4), p1, c1[:, :, None, None].expand(-1, -1, 3, 4)], 1
    )
    torch.testing.assert_close(head(features), head.conv_depth(tokens))
    assert LinearDepthHead([2, 3], 5, use_cls_token=False)(features).shape == (2, 5, 3, 4)


def test_levels_get_the_size_of_the_first() -> None:
    features = [*levels(2, size=(4, 6)), *levels(2, size=(2, 3))]
    for align_corners in (False, True):
        head = LinearDepthHead([2, 2], 1, align_corners=align_corners, use_cls_token=False)
        small = torch.nn.functional.interpolate(
            features[1][0], size=(4, 6), mode="bilinear", align_corners=align_corners
        )
        want = head.conv_depth(torch.cat([features[0][0], small], dim=1))
        torch.testing.assert_close(head(features), want)


def test_vectors_are_maps_of_one_position() -> None:
    assert LinearDepthHead([4], 3)([(torch.randn(2, 4), torch.randn(2, 4))]).shape == (2, 3, 1, 1)


def test_initialisation_is_small_and_without_bias() -> None:
    torch.manual_seed(0)
    for convolution in (LinearDepthHead([256], 64).conv_depth, LinearSegmentationHead([512], 64).conv):
        assert convolution.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not convolution.bias.any()


def test_batch_norm_comes_before_the_convolution() -> None:
    head = LinearDepthHead([4], 3, use_batchnorm=True, use_cls_token=False)
    (patches, token) = levels(4)[0]
    normed = (patches - patches.mean((0, 2, 3), keepdim=True)) / (
        patches.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(head.train()([(patches, token)]), head.conv_depth(normed))
    assert "batchnorm_layer.running_mean" in head.state_dict()


def test_prediction_is_resized() -> None:
    head, features = LinearDepthHead([2], 5), levels(2)
    want = torch.nn.functional.interpolate(head(features), size=(7, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(head.predict(features, rescale_to=(7, 9)), want)
    assert head.predict(features).shape == (2, 5, 512, 512)


def test_segmentation_head_drops_channels_in_training_but_not_in_predictions() -> None:
    head = LinearSegmentationHead([64], 5, use_batchnorm=False, dropout=0.5).train()
    (patches, _) = levels(64)[0]
    torch.manual_seed(0)
    assert not torch.allclose(head([patches]), head([patches]))
    torch.testing.assert_close(head.predict([patches], rescale_to=(3, 4)), head.conv(patches))
    torch.testing.assert_close(head.eval()([patches]), head.conv(patches))


def test_features_of_inference_mode_can_be_trained_on() -> None:
    with torch.inference_mode():
        features = [(torch.randn(1, 4, 2, 2), torch.randn(1, 4))]
    for head in (LinearDepthHead([4], 3), LinearSegmentationHead([4], 3, use_cls_token=True)):
        head(features).sum().backward()
        assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize("head", [LinearDepthHead([2, 2], 3), LinearSegmentationHead([2, 2], 3, use_cls_token=True)])
def test_another_number_of_levels(head: Any) -> None:
    with pytest.raises(ValueError, match="a linear head with 2 levels was given 1"):
        head(levels(2))


def test_missing_class_token() -> None:
    patches = levels(2)[0][0]
    for level in ((patches, None), (patches,)):
        with pytest.raises(ValueError, match="use_cls_token=True was given a level without its class token"):
            LinearDepthHead([2], 3)([level])  # type: ignore[list-item]
    for bare in (patches, (patches,)):
        with pytest.raises(ValueError, match="without its class token"):
            LinearSegmentationHead([2], 3, use_cls_token=True)([bare])


def test_other_ways_to_join_levels() -> None:
    with pytest.raises(ValueError, match="input_transform='concat'"):
        LinearDepthHead([2], 3, input_transform="concat")
    with pytest.raises(TypeError, match="channels"):
        LinearDepthHead([2], 3, channels=4)  # type: ignore[call-arg]
