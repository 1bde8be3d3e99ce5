"""ConvNeXt: the interface it shares with the ViT, initialisation, stochastic depth, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.models.convnext import Block, ConvNeXt, DropPath, LayerNorm, drop_path, get_convnext_arch


def tiny(**kwargs: Any) -> ConvNeXt:
    torch.manual_seed(0)
    model = ConvNeXt(depths=[1, 1, 2, 1], dims=[8, 12, 16, 20], **kwargs)
    model.init_weights()
    with torch.no_grad():  # Neutral norms and tiny layer scales would hide what they multiply.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def image(height: int = 64, width: int = 96, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_stages_come_in_their_own_order_each_with_its_own_norm() -> None:
    model, x = tiny(), image()
    first, last = model.get_intermediate_layers(x, n=[0, 3])
    last_again = model.get_intermediate_layers(x, n=(3, 0))
    assert torch.equal(first, last_again[0]) and torch.equal(last, last_again[1])
    assert torch.equal(last, model.forward_features(x)["x_norm_patchtokens"])


def test_maps_keep_their_channels_last_in_memory_on_the_cpu() -> None:
    """Else each norm and each residual would copy its input."""
    model, x = tiny(), image()
    maps: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda module, inputs, output: maps.extend([*inputs, output]))
    features = model.forward_features(x)
    assert len(maps) == 10 and all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    assert torch.equal(
        model.forward_features(x.to(memory_format=torch.channels_last))["x_prenorm"], features["x_prenorm"]
    )


def test_class_and_extra_tokens_come_with_the_patches() -> None:
    model, x = tiny(), image()
    ((patches, class_token, extra),) = model.get_intermediate_layers(
        x, n=1, return_class_token=True, return_extra_tokens=True
    )
    features = model.forward_features(x)
    assert patches.shape == (2, 6, 20) and extra.shape == (2, 0, 20)
    torch.testing.assert_close(class_token, features["x_norm_clstoken"])
    ((patches, extra),) = model.get_intermediate_layers(x, n=[1], reshape=True, return_extra_tokens=True)
    assert patches.shape == (2, 12, 8, 12) and patches.is_contiguous() and extra.shape == (2, 0, 12)


def test_later_stages_do_not_run_when_only_early_ones_are_wanted() -> None:
    model = tiny()
    calls: list[nn.Module] = []
    for layer in (*model.downsample_layers, *model.stages):
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    model.get_intermediate_layers(image(), n=[1])
    assert calls == [model.downsample_layers[0], model.stages[0], model.downsample_layers[1], model.stages[1]]


@pytest.mark.parametrize("n", [0, 5, -1, [], [4], [-1], [1, 1]])
def test_bad_stages_are_refused(n: Any) -> None:
    with pytest.raises(ValueError, match="1 to 4, or different indices from 0 to 3"):
        tiny().get_intermediate_layers(image(), n=n)


def test_patch_size_resizes_maps_but_not_features() -> None:
    plain, resizing, x = tiny(), tiny(patch_size=16), image()
    maps = resizing.get_intermediate_layers(x, n=4, reshape=True)
    assert [tuple(m.shape) for m in maps] == [(2, c, 4, 6) for c in (8, 12, 16, 20)]
    assert torch.equal(
        resizing.forward_features(x)["x_norm_patchtokens"], plain.forward_features(x)["x_norm_patchtokens"]
    )


def test_class_token_is_the_mean_before_the_norm() -> None:
    model, x = tiny(), image()
    features = model.forward_features(x)
    mean = features["x_prenorm"].mean(1)
    torch.testing.assert_close(features["x_norm_clstoken"], model.norm(mean))
    assert (features["x_norm_clstoken"] - features["x_norm_patchtokens"].mean(1)).abs().max() > 1e-3


def test_list_of_sizes_equals_one_by_one_and_masks_pass_through() -> None:
    model, xs = tiny(), [image(), image(40, 33)]
    mask = torch.ones(2, 6, dtype=torch.bool)
    for features, x in zip(model.forward_features(xs), xs, strict=True):
        assert torch.equal(features["x_norm_clstoken"], model(x)) and features["masks"] is None
    assert model(xs, [mask, None], is_training=True)[0]["masks"] is mask
    assert [len(tokens) for tokens in model(xs)] == [2, 2]
    with pytest.raises(ValueError, match="got 1 for 2"):
        model.forward_features_list(xs, [mask])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 64, 64), r"\[batch, 3, height, width\], got torch.float32 of shape \[3, 64, 64\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "floating-point images .* got torch.uint8"),
        (torch.zeros(1, 4, 64, 64), r"got torch.float32 of shape \[1, 4, 64, 64\]"),
        (torch.zeros(1, 3, 64, 31), r"sides of at least 32 pixels, got \[1, 3, 64, 31\]"),
    ],
)
def test_images_are_checked(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(x)


def test_small_images_serve_early_stages() -> None:
    (patches,) = tiny().get_intermediate_layers(image(8, 8), n=[1])
    assert patches.shape == (2, 1, 12)


def test_final_norm_is_one_module_under_two_names() -> None:
    model = tiny()
    names = [name for name in model.state_dict() if name.startswith("norm")]
    assert names == ["norm.weight", "norm.bias", "norms.3.weight", "norms.3.bias"]
    assert model.norms[3] is model.norm
    model.load_state_dict(model.state_dict() | {"norms.3.bias": torch.full((20,), 2.0)})
    assert model.norm.bias.eq(2).all()


def test_initialisation() -> None:
    model = ConvNeXt(dims=[32, 48, 64, 80], layer_scale_init_value=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    block = model.stages[2][1]
    assert isinstance(block, Block) and block.gamma is not None
    assert block.gamma.eq(0.5).all() and block.norm.weight.eq(1).all() and model.norm.bias.eq(0).all()
    for module in (block.pwconv1, block.dwconv, model.downsample_layers[0][0], model.downsample_layers[3][1]):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert module.weight.abs().max() < 0.2 and module.bias.eq(0).all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_builds_and_initialises_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = get_convnext_arch("convnext_large")(drop_path_rate=0.1)
        model.init_weights()
    assert all(parameter.is_meta for parameter in model.parameters())


def test_drop_rates_grow_linearly_over_all_blocks() -> None:
    rates = [
        m.drop_prob
        for m in ConvNeXt(depths=[1, 2, 1, 1], dims=[4] * 4, drop_path_rate=0.2).modules()
        if isinstance(m, DropPath)
    ]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_drop_path_zeroes_whole_samples_and_scales_the_others() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    y = drop_path(x, 0.25, training=True)
    kept = y[:, 0, 0] > 0
    assert torch.equal(y, torch.where(kept, 1 / 0.75, 0.0)[:, None, None].expand_as(x))
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert drop_path(x, 0.25, training=False) is x


def test_drop_path_only_acts_in_training_mode() -> None:
    model, x = tiny(drop_path_rate=0.5), image(batch=8)
    assert torch.equal(model(x), model(x))
    model.train()
    torch.manual_seed(0)
    first = model(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), first) and not torch.equal(model(x), first)
    with pytest.raises(ValueError, match=r"drop_prob must be in \[0, 1\), got 1"):
        DropPath(1.0)


@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 6, 3, 4), (2, 6, 3, 4, 2)])
def test_channels_first_norm_is_that_of_dimension_1(shape: tuple[int, ...]) -> None:
    norm = LayerNorm(6, data_format="channels_first")
    x = torch.randn(shape) * 3 + 1
    centred = x - x.mean(1, keepdim=True)
    want = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), want, rtol=1e-5, atol=1e-6)


def test_unknown_names_and_keywords_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="no ConvNeXt 'convnext_huge', only convnext_tiny, "):
        get_convnext_arch("convnext_huge")
    with pytest.raises(NotImplementedError, match="got 'channels_middle'"):
        LayerNorm(4, data_format="channels_middle")
    with pytest.raises(ValueError, match="patch_size must be positive"):
        tiny(patch_size=0)
    with pytest.raises(ValueError, match="one entry for each of the 4 stages"):
        ConvNeXt(depths=[1, 2])
    with pytest.raises(
        TypeError, match=r"does not know patchsize=4 \(did you mean 'patch_size'\?\); it takes in_chans"
    ):
        tiny(patchsize=4)


def test_bfloat16_and_autocast() -> None:
    model, x = tiny(patch_size=16), image()
    with torch.no_grad():
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(x)
        low = model.bfloat16()(x.bfloat16())
        (low_patches,) = model.get_intermediate_layers(x.bfloat16())
    assert low_patches.dtype == low.dtype == torch.bfloat16
    assert (low.float() - want).abs().max() < 0.1 and (autocast.float() - want).abs().max() < 0.1
