"""Putting weights into a model: strictly, without a copy, and with errors that say what the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.hub import backbones
from dinov3.hub.weights import load_backbone_, read_state_dict
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer
from dinov3.utils.weight_files import WeightsError

SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "n_storage_tokens": 2, "layerscale_init": 1e-5}


def build(device: str = "cpu", **kwargs: Any) -> DinoVisionTransformer:
    options = SIZES | {"mask_k_bias": True, "pos_embed_rope_dtype": "fp32"} | kwargs
    with torch.device(device):
        return DinoVisionTransformer(**options)


def state_of(seed: int = 0, **kwargs: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = build(**kwargs)
    model.init_weights()
    return {name: t if "periods" in name else t + 0.1 * torch.randn_like(t) for name, t in model.state_dict().items()}


def test_meta_model_takes_the_tensors_over(tmp_path: Path) -> None:
    torch.save(state_of(), tmp_path / "w.pth")
    state = read_state_dict(tmp_path / "w.pth")
    model = load_backbone_(build("meta"), state)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[name].data_ptr(), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    x = torch.randn(1, 3, 32, 32)
    want = load_backbone_(build().eval(), tmp_path / "w.pth")(x)
    torch.testing.assert_close(model.eval()(x), want)


def test_values_take_the_dtypes_and_the_gradients_of_the_model() -> None:
    state = state_of()
    low = {name: tensor.bfloat16() for name, tensor in state.items()}
    model = load_backbone_(build("meta"), low | {"cls_token": nn.Parameter(low["cls_token"])})
    assert all(t.dtype == torch.float32 and torch.equal(t, low[n].float()) for n, t in model.state_dict().items())
    rope_bf16 = load_backbone_(build("meta", pos_embed_rope_dtype="bf16"), state)
    assert torch.equal(rope_bf16.rope_embed.periods, state["rope_embed.periods"].bfloat16())
    frozen = load_backbone_(
        build("meta").requires_grad_(False), state | {"cls_token": nn.Parameter(state["cls_token"])}
    )
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_released_masks_are_used_as_they_are() -> None:
    state = {n: torch.zeros_like(t) if n.endswith("bias_mask") else t for n, t in state_of().items()}
    assert load_backbone_(build("meta"), state).blocks[0].attn.qkv.bias_mask.eq(0).all()


def test_norm_of_local_crops_starts_from_the_norm_if_the_weights_lack_it() -> None:
    state = state_of()
    model = load_backbone_(build("meta", untie_global_and_local_cls_norm=True), state)
    assert torch.equal(model.local_cls_norm.weight, state["norm.weight"])
    assert model.local_cls_norm.weight.data_ptr() != model.norm.weight.data_ptr()
    with pytest.raises(WeightsError, match=r"2 unknown \(local_cls_norm.weight, local_cls_norm.bias\)"):
        load_backbone_(build("meta"), model.state_dict())


def without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "cls_token"), r"^W does not fit M: 1 missing \(cls_token\)\.$"),
        (
            lambda s: without(s, "blocks.1."),
            r"it is a ViT with 32 channels and 1 blocks; 15 missing \((blocks\.1\.\S+,? ){5}and 10 more\)\.$",
        ),
        (lambda s: s | {"head.weight": torch.ones(1)}, r"1 unknown \(head.weight\)"),
        (
            lambda s: s | {"cls_token": torch.ones(1, 1, 8)},
            r"another shape \(cls_token is \[1, 1, 8\], expected \[1, 1, 32\]\)",
        ),
        (lambda s: s | {"norm.bias": torch.ones(32).int()}, r"1 of another type \(norm.bias is torch.int32\)"),
        (
            lambda s: s | {"blocks.0.attn.qkv.bias_mask": torch.full((96,), torch.nan)},
            "^W was saved from a model that was never initialised: blocks.0.attn.qkv.bias_mask is NaN",
        ),
    ],
)
def test_strict(change: Any, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load_backbone_(build("meta"), change(state_of()), source="W", target="M")


def on_meta(entry: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return getattr(backbones, entry)(pretrained=False).state_dict()


def convnext_tiny() -> dict[str, Tensor]:
    with torch.device("meta"):
        return ConvNeXt().state_dict()


def vit_tiny() -> dict[str, Tensor]:
    from dinov3.models.vision_transformer import vit_tiny

    with torch.device("meta"):
        return vit_tiny(n_storage_tokens=1).state_dict()


@pytest.mark.parametrize(
    ("state", "hint"),
    [
        (lambda: on_meta("dinov3_vitb16"), "its entries are those of dinov3_vitb16, use that instead;"),
        (lambda: on_meta("dinov3_vits16plus"), "its entries are those of dinov3_vits16plus, use that instead;"),
        (lambda: on_meta("dinov3_vit7b16"), "its entries are those of dinov3_vit7b16, use that instead;"),
        (convnext_tiny, "its entries are those of dinov3_convnext_tiny, use that instead;"),
        (vit_tiny, "it is a ViT with 192 channels and 12 blocks, like a vit_tiny;"),
        (lambda: {"embeddings.patch_embeddings.weight": torch.ones(1)}, "the layout of Hugging Face transformers"),
        (lambda: {"weight": torch.ones(1000, 8192), "bias": torch.ones(1000)}, "it is a single linear layer, such as"),
        (lambda: {"reassemble_blocks.projects.0.conv.weight": torch.ones(1)}, "head of a depth estimator"),
        (lambda: {"transformer.decoder.layers.0.norm.weight": torch.ones(1)}, "the weights of a detector, not of a"),
        (lambda: {"last_layer.weight": torch.ones(1)}, "it is the DINO head of a training"),
        (lambda: {"pos_embed": torch.ones(1), "cls_token": torch.ones(1, 1, 8)}, "another ViT with learned positions"),
        (lambda: {"embeddings.position_embeddings": torch.ones(1)}, "a DINOv2 model of Hugging Face transformers"),
        (lambda: {"layer1.0.conv1.weight": torch.ones(1)}, "it is a ResNet;"),
        (lambda: {"reg_token": torch.ones(1), "cls_token": torch.ones(1, 1, 8)}, "the layout of timm"),
    ],
)
def test_other_architecture_is_recognised(state: Any, hint: str) -> None:
    with torch.device("meta"):
        model = DinoVisionTransformer(embed_dim=384, num_heads=6)
    with pytest.raises(WeightsError, match="does not fit DinoVisionTransformer: ") as caught:
        load_backbone_(model, state())
    assert hint in str(caught.value)


def test_error_of_an_entry_names_file_and_entry(tmp_path: Path) -> None:
    torch.save(state_of(), tmp_path / "w.pth")
    with pytest.raises(
        WeightsError, match=rf"^{tmp_path / 'w.pth'} does not fit dinov3_vits16: .*cls_token is \[1, 1, 32\]"
    ):
        backbones.dinov3_vits16(weights=tmp_path / "w.pth")
