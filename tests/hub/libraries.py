"""Small DINOv3 models of Hugging Face transformers and timm, with random weights; and ours of the same sizes.

Those packages are imported in the functions: they take seconds, and only some tests need them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.hub.architectures import PUBLISHED, PublishedConvNeXt, PublishedViT

DIM, DEPTH, HEADS, REGISTERS = 32, 2, 2, 4
DEPTHS, DIMS = [1, 1, 2, 1], [8, 16, 24, 32]
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))

#: Sizes of FFNs: hidden channels, by whether they are gated.
HIDDEN = {False: 64, True: 48}


def make_entries_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give three ViTs and a ConvNeXt of the hub the sizes of the models here."""
    small = partial(PublishedViT, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, hashes={"LVD1689M": "0" * 8})
    monkeypatch.setitem(PUBLISHED, "dinov3_vits16", small(ffn_ratio=2, ffn_layer="mlp"))
    monkeypatch.setitem(PUBLISHED, "dinov3_vits16plus", small(ffn_ratio=2.25, ffn_layer="swiglu"))
    monkeypatch.setitem(PUBLISHED, "dinov3_vit7b16", small(depth=3, ffn_ratio=2.25, ffn_layer="swiglu", qkv_bias=False))
    convnext = PublishedConvNeXt(depths=DEPTHS, dims=DIMS, hashes={"LVD1689M": "0" * 8})
    monkeypatch.setitem(PUBLISHED, "dinov3_convnext_tiny", convnext)


def randomise_(model: nn.Module, seed: int = 0) -> Any:
    """Give every parameter random values of an order at which each of them shows in the features."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = 0.1 * torch.randn(parameter.shape, generator=generator)
            is_scale = "gamma" in name or "lambda" in name or ("norm" in name and name.endswith("weight"))
            parameter.copy_(values + 1 if is_scale else values)
    return model.eval()


def transformers_vit(*, gated: bool = False, **options: Any) -> Any:
    """A `DINOv3ViTModel`."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    sizes = {
        "hidden_size": DIM,
        "intermediate_size": HIDDEN[gated],
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "num_register_tokens": REGISTERS,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
    }
    return randomise_(DINOv3ViTModel(DINOv3ViTConfig(**sizes | options)))


def transformers_convnext() -> Any:
    """A `DINOv3ConvNextModel`."""
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

    return randomise_(DINOv3ConvNextModel(DINOv3ConvNextConfig(hidden_sizes=DIMS, depths=DEPTHS)))


def timm_vit(*, gated: bool = False, bias: bool = True, **options: Any) -> Any:
    """A DINOv3 ViT of timm."""
    import timm

    name = f"vit_small{'_plus' if gated else ''}_patch16_dinov3{'_qkvb' if bias else ''}"
    sizes = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": HIDDEN[gated] / DIM}
    return randomise_(timm.create_model(name, global_pool="token", **sizes | options))


def timm_convnext() -> Any:
    """A ConvNeXt of timm, with the structure of DINOv3's."""
    import timm

    model = timm.create_model("convnext_tiny.dinov3_lvd1689m", depths=DEPTHS, dims=DIMS, num_classes=0)
    return randomise_(model)


def release_state(entry: str, seed: int = 0, *, rounded: bool = True) -> dict[str, Tensor]:
    """A state dict of a hub entry as it would be published, with random values.

    With `rounded` periods, as published files have them: then the features of other libraries, which compute theirs,
    differ by more than 1e-4.
    """
    from dinov3.hub import backbones

    state = randomise_(getattr(backbones, entry)(pretrained=False), seed).state_dict()
    if rounded and "rope_embed.periods" in state:
        state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16().float()
    return {
        name: tensor * state[name.replace("qkv.bias", "qkv.bias_mask")] if name.endswith("qkv.bias") else tensor
        for name, tensor in state.items()
    }


def assert_near(found: Tensor, wanted: Tensor, relative: float = 1e-4) -> None:
    """Assert that the largest difference is at most `relative` of the largest value."""
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= relative * float(wanted.abs().max())


def assert_bits_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Assert that two state dicts have the same names, dtypes, shapes and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))), name
