from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dinov3.heads.dinotxt.model import DINOTxt, DINOTxtConfig
from dinov3.heads.dinotxt.text_transformer import TextTransformer
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer

OPTIONS: dict[str, Any] = {
    "embed_dim": 64,
    "vision_model_use_patch_tokens": True,
    "vision_model_num_head_blocks": 1,
    "text_model_tokens_pooler_type": "argmax",
}


def vit(**options: Any) -> DinoVisionTransformer:
    return DinoVisionTransformer(patch_size=16, embed_dim=32, depth=2, num_heads=2, n_storage_tokens=2, **options)


def text_transformer(*, is_causal: bool = True, **options: Any) -> TextTransformer:
    return TextTransformer(12, 30, 16, 2, 2, 4.0, is_causal, **options)


def build(*, is_causal: bool = True, **options: Any) -> DINOTxt:
    torch.manual_seed(0)
    model = DINOTxt(DINOTxtConfig(**{**OPTIONS, **options}), vit(), text_transformer(is_causal=is_causal))
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):  # 1e-5 would hide what the blocks do
            nn.init.ones_(parameter)
    return model.eval()


TEXT = torch.tensor([[28, 5, 29, 0, 0, 0, 0, 0], [28, 1, 2, 3, 29, 0, 0, 0]])


def test_init_weights_reaches_every_entry() -> None:
    model = DINOTxt(DINOTxtConfig(**OPTIONS), vit(layerscale_init=1e-5), text_transformer(ls_init_value=0.1))
    for entry in model.state_dict().values():
        entry.fill_(torch.nan)
    model.init_weights()
    assert [name for name, entry in model.state_dict().items() if entry.isnan().any()] == []
    block = model.text_model.backbone.blocks[0]
    assert block.ls1.gamma.tolist() == [pytest.approx(0.1)] * 16 and not block.feed_forward.fc2.bias.any()


@pytest.mark.parametrize("pooler", ["argmax", "first", "last"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("head_is_causal", [True, False])
@torch.no_grad()
def test_texts_are_cut_only_where_it_changes_nothing(pooler: str, is_causal: bool, head_is_causal: bool) -> None:
    model = build(
        is_causal=is_causal,
        text_model_tokens_pooler_type=pooler,
        text_model_num_head_blocks=1,
        text_model_head_blocks_is_causal=head_is_causal,
    )
    lengths: list[int] = []
    model.text_model.backbone.register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1]))
    cut = model.encode_text(TEXT)
    model.text_model.cuts_text = False
    torch.testing.assert_close(cut, model.encode_text(TEXT), atol=1e-6, rtol=1e-5)
    can_cut = is_causal and head_is_causal
    assert lengths == [{"argmax": 5, "first": 1, "last": 8}[pooler] if can_cut else 8, 8]


@torch.no_grad()
def test_first_half_of_an_image_is_its_class_token_and_the_rest_the_mean_patch_token() -> None:
    model = build()
    images = torch.rand(2, 3, 48, 32)
    class_token, patch_tokens, _ = model.visual_model.get_class_and_patch_tokens(images)
    assert patch_tokens.shape == (2, 6, 32)
    torch.testing.assert_close(model.encode_image(images), torch.cat([class_token, patch_tokens.mean(1)], dim=1))


def test_frozen_backbone_stays_in_evaluation_mode() -> None:
    model = build(text_model_freeze_backbone=False).train()
    assert not model.visual_model.backbone.training and not model.visual_model.backbone.blocks[0].training
    assert model.visual_model.head.training and model.text_model.backbone.training
    assert not build(text_model_freeze_backbone=True).train().text_model.backbone.training
    assert build(vision_model_freeze_backbone=False).train().visual_model.backbone.training


def test_impossible_options() -> None:
    for options, message in (
        ({"vision_model_use_class_token": False, "vision_model_use_patch_tokens": False}, "an image needs a vector"),
        ({"embed_dim": 63}, "embed_dim=63 cannot be shared"),
        ({"text_model_tokens_pooler_type": "frist"}, "did you mean 'first'"),
        ({"vision_model_patch_tokens_pooler_type": "median"}, "patch_tokens_pooler_type"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**options)


def test_a_convnext_needs_a_head_without_blocks() -> None:
    backbone = ConvNeXt(depths=[1, 1, 1, 1], dims=[8, 8, 16, 32], patch_size=16)
    with pytest.raises(ValueError, match="attention heads, which a ConvNeXt does not have"):
        DINOTxt(DINOTxtConfig(**OPTIONS), backbone, text_transformer())
    model = DINOTxt(
        DINOTxtConfig(**{**OPTIONS, "vision_model_num_head_blocks": 0}), backbone, text_transformer()
    ).eval()
    model.init_weights()
    assert model.encode_image(torch.rand(1, 3, 64, 64)).shape == (1, 64)


@torch.no_grad()
def test_texts_that_do_not_fit() -> None:
    model = build()
    assert model.encode_text(torch.empty(0, 8, dtype=torch.int64)).shape == (0, 64)
    assert model.encode_text(TEXT[:1, :3]).shape == (1, 64)
    with pytest.raises(ValueError, match=r"at most 12 positions\], got \[1, 13\]"):
        model.encode_text(torch.arange(13)[None])
    with pytest.raises(ValueError, match="go from 0 to 30, but the vocabulary has 30"):
        model.encode_text(torch.tensor([[30, 0]]).flip(1))
