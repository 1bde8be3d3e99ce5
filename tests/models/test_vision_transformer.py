from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dinov3.models import build_model, build_model_from_cfg
from dinov3.models.vision_transformer import DinoVisionTransformer, vit_7b, vit_tiny


def tiny(**kwargs: Any) -> DinoVisionTransformer:
    torch.manual_seed(0)
    options = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "n_storage_tokens": 2}
    model = DinoVisionTransformer(**options | {"pos_embed_rope_dtype": "fp32"} | kwargs)
    model.init_weights()
    return model.eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 8, 12)), generator=torch.Generator().manual_seed(0))


def test_outputs_of_one_image_size() -> None:
    features = tiny().forward_features(images())
    assert isinstance(features, dict)
    shapes = {name: tuple(value.shape) for name, value in features.items() if value is not None}
    assert shapes == {
        "x_norm_clstoken": (2, 32),
        "x_storage_tokens": (2, 2, 32),
        "x_norm_patchtokens": (2, 6, 32),
        "x_prenorm": (2, 9, 32),
    }


def test_training_flag_of_forward_is_not_the_mode() -> None:
    model, x = tiny(), images()
    assert torch.equal(model(x), model(x, is_training=True)["x_norm_clstoken"])
    assert not model.training
    assert [y.shape for y in model([x, x])] == [(2, 32), (2, 32)]


def test_the_mask_token_stands_where_the_mask_is_true() -> None:
    model, x = tiny(), images()
    with torch.no_grad():
        model.mask_token.fill_(7)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4] = True
    tokens, grid = model.prepare_tokens_with_masks(x, mask)
    plain, _ = model.prepare_tokens_with_masks(x)
    assert grid == (2, 3) and (tokens[1, 3 + 4] == 7).all()
    tokens[1, 3 + 4] = plain[1, 3 + 4]
    assert torch.equal(tokens, plain)


def test_a_broken_mask_token_does_not_leak_into_features_but_has_a_gradient() -> None:
    model, x = tiny(), images()
    want = model(x)
    with torch.no_grad():
        model.mask_token.fill_(torch.nan)
    assert torch.equal(model(x), want)
    model(x).sum().backward()
    assert model.mask_token.grad is not None and not model.mask_token.grad.any()


def test_rope_augmentation_is_drawn_for_every_block_and_only_in_training() -> None:
    model = tiny(pos_embed_rope_rescale_coords=2)
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[1][0][0]))
    model.train()(images())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    seen.clear()
    model.eval()(images())
    assert seen[0] is seen[1] is seen[2]


def test_intermediate_layers_are_in_the_order_of_the_blocks_and_stop_early() -> None:
    model, x = tiny(), images()
    first, last = model.get_intermediate_layers(x, n=[2, 0])
    assert torch.equal(last, model.get_intermediate_layers(x)[0]) and not torch.equal(first, last)
    calls: list[int] = []
    model.blocks[2].register_forward_hook(lambda *_: calls.append(2))
    model.get_intermediate_layers(x, n=[0, 1])
    assert calls == []


@pytest.mark.parametrize("n", [0, 4, [0, 0], [-1], [3], []])
def test_blocks_that_do_not_exist(n: Any) -> None:
    with pytest.raises(ValueError, match="from 1 to 3, or different indices from 0 to 2, got"):
        tiny().get_intermediate_layers(images(), n=n)


@pytest.mark.parametrize(
    ("x", "masks", "message"),
    [
        (torch.zeros(3, 8, 8), None, r"expected floating-point images \[batch, 3, .* of shape \[3, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8), None, r"expected floating-point images \[batch, 3"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, "got torch.uint8"),
        (torch.zeros(1, 3, 3, 8), None, "sides of at least 4 pixels"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 4), "expected bool masks of shape .*got torch.float32"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 5, dtype=torch.bool), r"expected bool masks of shape \[1, 4\]"),
        ([torch.zeros(1, 3, 8, 8)], [None, None], "2 for 1"),
    ],
)
def test_wrong_inputs(x: Any, masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny().forward_features(x, masks)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"drop_path": 0.1}, TypeError, r"does not know drop_path=0.1 \(did you mean 'drop_path_rate'\?\)"),
        ({"ffn_layer": "swigluu"}, ValueError, r"ffn_layer='swigluu' \(did you mean 'swiglu'\?\): choose one of mlp"),
        ({"norm_layer": "batch"}, ValueError, "choose one of layernorm, layernormbf16, rmsnorm"),
        ({"pos_embed_rope_dtype": "fp64"}, ValueError, "choose one of fp32, fp16, bf16"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny(**kwargs)


def test_everything_can_be_built_on_the_meta_device() -> None:
    model = vit_7b(device="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_features_do_not_depend_on_what_else_is_in_the_list() -> None:
    model, xs = tiny(), [images(2, 3, 8, 8), images(3, 3, 16, 4)]
    for features, x in zip(model.forward_features_list(xs), xs, strict=True):
        torch.testing.assert_close(features["x_prenorm"], model(x, is_training=True)["x_prenorm"])


STUDENT = {"arch": "vit_tiny", "patch_size": 8, "layerscale": 0.5, "drop_path_rate": 0.2, "ffn_ratio": None}


def test_student_and_teacher_of_a_configuration() -> None:
    student, teacher, dim = build_model(OmegaConf.create(STUDENT | {"depth": 2, "in_chans": 4}), device="meta")
    assert dim == 192 and len(student.blocks) == 2 and student.in_chans == 4
    assert student.blocks[0].sample_drop_ratio == 0.2 and teacher.blocks[0].sample_drop_ratio == 0.0
    assert student.blocks[0].ls1.init_values == 0.5
    assert student.blocks[0].mlp.fc1.out_features == 4 * 192


def test_ratio_of_a_configuration_wins_over_the_architectures() -> None:
    cfg = OmegaConf.create({"student": STUDENT | {"ffn_ratio": 2.0}, "crops": {"global_crops_size": [32, 48]}})
    teacher, _ = build_model_from_cfg(cfg, only_teacher=True)
    assert teacher.blocks[0].mlp.fc1.out_features == 384
    assert teacher.patch_embed.img_size == (48, 48)


def test_architectures_that_do_not_exist() -> None:
    with pytest.raises(NotImplementedError, match="no architecture 'vit_smal', only vit_tiny, vit_small, "):
        build_model(OmegaConf.create(STUDENT | {"arch": "vit_smal"}))
    assert vit_tiny(depth=1, device="meta").n_blocks == 1
