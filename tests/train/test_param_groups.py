from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.train.param_groups import (
    fuse_params_groups,
    get_params_groups_with_decay_fsdp,
    get_vit_lr_decay_rate,
    remove_fsdp_compile_names,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(2)
        self.fc = nn.Linear(2, 2)
        self.gamma = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm1(x)) * self.gamma


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1))
        self.patch_embed = nn.Linear(2, 2)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.downsample_layers = nn.Sequential(nn.Conv2d(3, 2, 1), nn.LayerNorm(2))
        self.stages = nn.Sequential(nn.Linear(2, 2))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(2, 2)
        self.last_layer = nn.Linear(2, 2, bias=False)


def by_name(model: nn.Module, **arguments: Any) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in get_params_groups_with_decay_fsdp(model, **arguments)}


def test_one_group_per_trainable_parameter_in_order() -> None:
    model = Backbone()
    groups = get_params_groups_with_decay_fsdp(model)
    expected = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert [group["name"] for group in groups] == [name for name, _ in expected]
    assert all(group["params"] is parameter for group, (_, parameter) in zip(groups, expected, strict=True))
    assert all(set(g) == {"name", "params", "is_last_layer", "lr_multiplier", "wd_multiplier"} for g in groups)


def test_layerwise_learning_rates_of_a_transformer() -> None:
    groups = by_name(Backbone(), lr_decay_rate=0.5, patch_embed_lr_mult=0.2)
    rates = {name: group["lr_multiplier"] for name, group in groups.items()}
    assert rates["cls_token"] == 0.125
    assert rates["patch_embed.weight"] == rates["patch_embed.bias"] == pytest.approx(0.025)
    assert rates["blocks.0.fc.weight"] == rates["blocks.0.gamma"] == 0.25
    assert rates["blocks.1.norm1.weight"] == 0.5
    assert rates["norm.weight"] == 1.0


def test_biases_norms_and_scales_are_not_decayed_but_tokens_are() -> None:
    decays = {name: group["wd_multiplier"] for name, group in by_name(Backbone()).items()}
    decayed = {"cls_token", "patch_embed.weight", "blocks.0.fc.weight", "blocks.1.fc.weight"}
    assert {name for name, decay in decays.items() if decay == 1} == decayed
    assert {decays[name] for name in decays.keys() - decayed} == {0}


def test_network_without_blocks_has_no_layerwise_decay() -> None:
    assert {group["lr_multiplier"] for group in by_name(Convolutional(), lr_decay_rate=0.5).values()} == {1.0}


def test_norms_that_are_not_called_so_are_decayed_unless_chosen_by_type() -> None:
    name = "downsample_layers.1.weight"
    assert by_name(Convolutional())[name]["wd_multiplier"] == 1
    chosen_by_type = by_name(Convolutional(), norms_by_type=True)
    assert chosen_by_type[name]["wd_multiplier"] == 0
    assert chosen_by_type["stages.0.weight"]["wd_multiplier"] == 1


def test_weight_decay_multiplier_of_the_dino_head_acts_on_only_that_head() -> None:
    dino_head = by_name(Head(), dino_head_wd_multiplier=3.0, is_dino_head=True)
    assert dino_head["mlp.weight"]["wd_multiplier"] == dino_head["last_layer.weight"]["wd_multiplier"] == 3
    assert dino_head["mlp.bias"]["wd_multiplier"] == 0
    assert by_name(Head(), dino_head_wd_multiplier=3.0)["mlp.weight"]["wd_multiplier"] == 1


def test_prototypes_are_marked() -> None:
    assert [name for name, group in by_name(Head()).items() if group["is_last_layer"]] == ["last_layer.weight"]


def test_wrapped_parameters_have_their_own_names_and_rates() -> None:
    model = Backbone()
    model.blocks[0].fc = torch.compile(model.blocks[0].fc)
    nn.utils.parametrize.register_parametrization(model.blocks[1].fc, "weight", nn.Identity())
    groups = by_name(model, lr_decay_rate=0.5)
    assert groups["blocks.0.fc.weight"]["lr_multiplier"] == 0.25
    assert groups["blocks.1.fc.weight"]["lr_multiplier"] == 0.5
    assert groups.keys() == by_name(Backbone()).keys()


@pytest.mark.parametrize(
    "wrapped",
    [
        "blocks.0._checkpoint_wrapped_module.fc.weight",
        "_orig_mod.blocks.0.fc.weight",
        "module._fsdp_wrapped_module.blocks.0._orig_mod.fc.parametrizations.weight.original",
    ],
)
def test_names_lose_what_wrappers_add(wrapped: str) -> None:
    assert remove_fsdp_compile_names(wrapped) == "blocks.0.fc.weight"


def test_rates_of_chunked_blocks_and_of_other_networks() -> None:
    assert get_vit_lr_decay_rate("backbone.blocks.1.3.fc.weight", 0.5, 4, chunked_blocks=True) == 0.5
    assert get_vit_lr_decay_rate("blocks.1.fc.weight", 0.5, 4) == 1.0


def test_fused_groups_keep_the_order_of_first_appearance() -> None:
    groups = get_params_groups_with_decay_fsdp(Backbone(), lr_decay_rate=0.5)
    fused = fuse_params_groups(groups)
    seen = list(dict.fromkeys((g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]) for g in groups))
    assert [(g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]) for g in fused] == seen
    assert all(set(group) == {"params", "lr_multiplier", "wd_multiplier", "is_last_layer"} for group in fused)
    assert sum(len(group["params"]) for group in fused) == len(groups)
    assert fused[0]["params"] == [groups[0]["params"], groups[1]["params"]]
    torch.optim.AdamW(fused)


def test_fusing_by_other_keys() -> None:
    fused = fuse_params_groups(get_params_groups_with_decay_fsdp(Head()), keys=("is_last_layer",))
    assert [(group["is_last_layer"], len(group["params"])) for group in fused] == [(False, 2), (True, 1)]
