from __future__ import annotations

import torch

from dinov3.layers.perceptron import Perceptron


def test_relu_comes_between_layers_but_not_last() -> None:
    torch.manual_seed(0)
    mlp, x = Perceptron(3, 5, 2, 3), torch.randn(4, 3)
    torch.nn.init.constant_(mlp.layers[-1].bias, -1.0)  # type: ignore[arg-type]
    first, second, last = mlp.layers
    want = last(second(first(x).clamp(min=0)).clamp(min=0))
    assert torch.equal(mlp(x), want) and (want < 0).any()
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(5, 3), (5, 5), (2, 5)]  # type: ignore[union-attr]


def test_one_layer_is_linear() -> None:
    mlp, x = Perceptron(3, 5, 2, 1), torch.randn(4, 3)
    assert torch.equal(mlp(x), mlp.layers[0](x))
