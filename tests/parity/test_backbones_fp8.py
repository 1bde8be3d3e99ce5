"""Golden cases of the 8-bit linear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dinov3.layers import convert_linears_to_fp8

from . import backbones_runner, deterministic, golden


@pytest.mark.parametrize("case", golden.cases("backbones", "fp8."), ids=lambda c: c["id"])
def test_results_and_gradients_equal_the_published_method(case: dict[str, Any]) -> None:
    recipe, inputs = case["recipe"], backbones_runner.make_inputs(case)
    model = nn.Sequential(nn.Linear(*recipe["linear"]))
    deterministic.fill_(model, recipe["fill"])
    model.to(getattr(torch, recipe["cast"]))
    convert_linears_to_fp8(model, filter="")
    x = inputs["x"].requires_grad_()
    y = model(x)
    y.backward(inputs["g"].to(y.dtype))
    gradients = {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    backbones_runner.compare(case, {"y": y, "grad.x": x.grad} | gradients)
