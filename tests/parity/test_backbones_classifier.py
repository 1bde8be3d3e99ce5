"""Golden case, address and state dict of the published classifier."""

from __future__ import annotations

import torch

from dinov3.hub import classifiers
from dinov3.hub.classifiers import dinov3_vit7b16_lc

from . import backbones_runner, golden
from .state_dicts import assert_matches_manifest


def test_outputs_equal_the_published_method() -> None:
    backbones_runner.check(golden.case("backbones", "classifier.tiny7b"))


def test_state_dict() -> None:
    model = dinov3_vit7b16_lc(pretrained=False, device="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert not any(module.training for module in model.modules())
    assert_matches_manifest(model, "dinov3_vit7b16_lc")


def test_address_of_the_head() -> None:
    want = golden.area("backbones")["facts"]["hub_urls"]["dinov3_vit7b16_lc:head:IMAGENET1K"]
    assert classifiers.PUBLISHED.url() == want
    with torch.device("meta"):
        assert dinov3_vit7b16_lc(pretrained=False).linear_head.in_features == 8192
