"""The entries of a head among what a file holds, and into the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dinov3.heads.weights import WeightsError, head_entries, load_head_, set_aside

HEAD = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}


@pytest.mark.parametrize(
    "content",
    [
        HEAD,
        {"model": HEAD, "iteration": 3},
        {f"module.{name}": entry for name, entry in HEAD.items()},
        {"model": {f"module.module.{name}": entry for name, entry in HEAD.items()}},
        {f"decoder.{name}": entry for name, entry in HEAD.items()} | {"encoder.backbone.weight": torch.zeros(1)},
        {f"module.decoder.module.{name}": entry for name, entry in HEAD.items()} | {"module.encoder.weight": 0},
    ],
)
def test_entries_of_every_kind_of_file(content: Any) -> None:
    entries = head_entries(content)
    assert entries.keys() == HEAD.keys() and all(entries[name] is HEAD[name] for name in HEAD)


def test_prefix_is_that_of_the_model() -> None:
    whole = {f"linear_head.{name}": entry for name, entry in HEAD.items()} | {"backbone.weight": torch.zeros(1)}
    assert head_entries(whole, "linear_head.").keys() == HEAD.keys()
    assert head_entries(whole).keys() == whole.keys()


def test_a_head_on_the_meta_device_takes_the_tensors_over() -> None:
    head = load_head_(nn.Linear(3, 2, device="meta"), HEAD, source="here", target="a head")
    assert head.weight.data_ptr() == HEAD["weight"].data_ptr() and head.weight.requires_grad


def test_values_are_converted_and_frozen_parameters_stay_frozen() -> None:
    head = nn.Linear(3, 2, dtype=torch.bfloat16).requires_grad_(False)
    load_head_(head, HEAD, source="here", target="a head")
    assert head.weight.dtype == torch.bfloat16 and head.weight.eq(1).all() and not head.weight.requires_grad


def test_entries_that_do_not_fit() -> None:
    with pytest.raises(
        WeightsError,
        match=r"^here does not fit a head: expected weight \[2, 4\], bias \[2\], found weight \[2, 3\], b",
    ):
        load_head_(nn.Linear(4, 2), HEAD, source="here", target="a head")


def test_a_backbone_inside_a_head_is_set_aside_and_comes_back() -> None:
    backbone = nn.Linear(3, 3)
    inner = nn.Sequential(nn.Linear(3, 3), backbone)
    head = nn.Sequential(inner, nn.Linear(3, 3))
    names = list(head.state_dict())
    with pytest.raises(KeyError), set_aside(head, backbone) as prefix:
        assert prefix == "0.1." and not any(name.startswith("0.1.") for name in head.state_dict())
        head.double()
        raise KeyError  # it comes back even then
    assert inner[1] is backbone and list(head.state_dict()) == names
    assert backbone.weight.dtype == torch.float32 and head[1].weight.dtype == torch.float64
    with set_aside(head, nn.Linear(3, 3)) as prefix:
        assert prefix is None and list(head.state_dict()) == names


def test_a_parameter_with_several_names_may_have_any_of_them() -> None:
    head = nn.ModuleDict({"first": nn.Linear(3, 2), "other": nn.Linear(3, 2)})
    head["second"] = head["first"]
    values = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    other = {f"other.{name}": entry for name, entry in values.items()}
    for names in (["first"], ["second"], ["first", "second"]):
        head["first"].weight.data.zero_()
        entries = other | {f"{name}.{key}": entry for name in names for key, entry in values.items()}
        load_head_(head, entries, source="w.pth", target="the head")
        assert torch.equal(head["first"].weight, values["weight"]) and head["first"] is head["second"]
    with pytest.raises(WeightsError, match="first.weight"):
        load_head_(head, other, source="w.pth", target="the head")
