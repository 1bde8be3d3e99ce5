"""Linear layers with 8-bit products, against an emulation in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dinov3.layers import LinearKMaskedBias, convert_linears_to_fp8
from dinov3.layers.fp8_linear import Fp8Linear, Fp8LinearKMaskedBias, fp8_problem

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def rounded(x: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    scale = maximum.float().clamp(min=1e-12) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn).float(), scale


def emulated_product(a: Tensor, b: Tensor, b_maximum: Tensor) -> Tensor:
    a8, a_scale = rounded(a, a.abs().amax(-1, keepdim=True))
    b8, b_scale = rounded(b, b_maximum)
    return ((a8 @ b8.T).bfloat16().float() * a_scale * b_scale.reshape(1, -1)).bfloat16()


def linear(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64, bias=bias, dtype=dtype))


def masked_linear() -> nn.Sequential:
    torch.manual_seed(0)
    masked = LinearKMaskedBias(64, 192)
    nn.init.normal_(masked.bias)
    masked.bias_mask.copy_(torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(64))
    return nn.Sequential(masked)


def check_against_the_emulation(dtype: torch.dtype, device: torch.device = CPU) -> None:
    model = convert_linears_to_fp8(linear(dtype=dtype).to(device), filter="")
    weight, bias = model[0].weight, model[0].bias
    x = torch.randn(3, 8, 128).to(device, dtype).requires_grad_()
    y = model(x)
    tolerance = {"rtol": 0.0, "atol": 0.0} if device == CPU else {"rtol": 2**-7, "atol": 1e-3}
    expected = emulated_product(x.flatten(0, 1), weight, weight.abs().amax(1, keepdim=True)) + bias
    torch.testing.assert_close(y, expected.view_as(y), **tolerance)
    grad = torch.randn(y.shape).to(y)
    y.backward(grad)
    flat, flat_x = grad.flatten(0, 1), x.detach().flatten(0, 1)
    expected = emulated_product(flat, weight.T, weight.abs().amax()).to(dtype)
    torch.testing.assert_close(x.grad, expected.view_as(x), **tolerance)
    torch.testing.assert_close(weight.grad, flat.T @ flat_x)
    torch.testing.assert_close(bias.grad, flat.sum(0))
    assert y.dtype == x.grad.dtype == weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients_are_those_of_the_emulation(dtype: torch.dtype) -> None:
    check_against_the_emulation(dtype)


def test_results_are_close_to_those_of_the_plain_layer() -> None:
    model, x = linear(), torch.randn(32, 128)
    plain = model(x)
    in_8_bits = convert_linears_to_fp8(model, filter="")(x)
    error = (in_8_bits - plain).norm() / plain.norm()
    assert 0.005 < error < 0.05


def test_without_a_bias_results_are_bfloat16_and_gradients_are_not() -> None:
    model = convert_linears_to_fp8(linear(bias=False), filter="")
    x = torch.randn(4, 128, requires_grad=True)
    y = model(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == model[0].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(128,), (1, 128), (2, 3, 5, 128)], ids=str)
def test_rows_of_any_number_and_shape(shape: tuple[int, ...]) -> None:
    model, x = convert_linears_to_fp8(linear(), filter=""), torch.randn(shape)
    y = model(x)
    assert y.shape == (*shape[:-1], 64)
    rows = torch.cat([model(row[None]) for row in x.reshape(-1, 128)])
    assert torch.equal(y.reshape(-1, 64), rows)


def test_rows_of_zeros_and_huge_rows_stay_finite() -> None:
    model = convert_linears_to_fp8(linear(bias=False), filter="")
    x = torch.stack([torch.zeros(128), torch.full((128,), 1e30), torch.full((128,), 1e-30)]).requires_grad_()
    y = model(x)
    assert y.isfinite().all() and (y[0] == 0).all() and y[1].abs().max() > 1e28
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_values_that_are_not_finite_are_not_hidden() -> None:
    model, x = convert_linears_to_fp8(linear(), filter=""), torch.zeros(3, 128)
    x[1, 5], x[2, 5] = torch.nan, torch.inf
    assert model(x).isfinite().all(dim=1).tolist() == [True, False, False]


def test_frozen_parameters_get_no_gradient() -> None:
    model = convert_linears_to_fp8(linear(), filter="").requires_grad_(False)
    x = torch.randn(4, 128, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and model[0].weight.grad is None and model[0].bias.grad is None


def test_the_bias_of_the_keys_stays_masked() -> None:
    plain = masked_linear()
    model = convert_linears_to_fp8(copy.deepcopy(plain), filter="")
    assert type(model[0]) is Fp8LinearKMaskedBias and isinstance(model[0], LinearKMaskedBias)
    assert torch.equal(model[0].bias_mask, plain[0].bias_mask)
    zero = torch.zeros(2, 64)
    assert torch.equal(model(zero), plain(zero)) and (model(zero)[:, 64:128] == 0).all()
    model(zero).sum().backward()
    assert torch.equal(model[0].bias.grad, 2 * plain[0].bias_mask)


@pytest.mark.parametrize("make", [linear, masked_linear])
def test_parameters_buffers_and_names_are_the_old_ones(make: object) -> None:
    model = make()  # type: ignore[operator]
    before = model.state_dict(keep_vars=True)
    assert convert_linears_to_fp8(model.eval(), filter="") is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not model[0].training and isinstance(model[0], nn.Linear)


def test_only_names_that_match_are_replaced() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(linear() for _ in range(2)), "head": linear()})
    convert_linears_to_fp8(model, filter=r"blocks\.1")
    assert [type(model[key][index][0]) for key, index in (("blocks", 0), ("blocks", 1))] == [nn.Linear, Fp8Linear]
    assert type(model["head"][0]) is nn.Linear


def test_a_layer_with_two_names_keeps_its_parameters_in_common() -> None:
    shared = linear()
    model = convert_linears_to_fp8(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared[0])}), filter="")
    assert type(model["b"][0]) is Fp8Linear and model["a"][0].weight is model["b"][0].weight


def test_nothing_to_replace_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no linear layer of Sequential has a name that matches 'blocks'"):
        convert_linears_to_fp8(linear(), filter="blocks")
    with pytest.raises(AssertionError, match="no linear layer of Linear"):
        convert_linears_to_fp8(nn.Linear(64, 64), filter="")


class Other(nn.Linear):
    """A linear layer that computes something else."""


def test_other_kinds_of_linear_layers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64), Other(64, 64))
    with pytest.raises(AssertionError, match="1 is a Other"):
        convert_linears_to_fp8(model, filter="")
    assert type(model[0]) is nn.Linear
    twice = convert_linears_to_fp8(linear(), filter="")
    with pytest.raises(AssertionError, match="0 is a Fp8Linear"):
        convert_linears_to_fp8(twice, filter="")


@pytest.mark.parametrize(("channels_in", "channels_out"), [(96, 64), (64, 32)])
def test_channels_that_do_not_fit_are_refused_before_anything_is_replaced(channels_in: int, channels_out: int) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(channels_in, channels_out))
    with pytest.raises(RuntimeError, match=f"1 has {channels_in} input and {channels_out} output.*multiples of 64"):
        convert_linears_to_fp8(model, filter="")
    assert type(model[0]) is nn.Linear


def test_devices_without_8_bit_products_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ampere:
        @staticmethod
        def get_device_capability(device: torch.device) -> tuple[int, int]:
            return 8, 0

    assert fp8_problem(CPU) is None
    assert "not a device of type 'mps'" in str(fp8_problem(torch.device("mps")))
    monkeypatch.setattr(torch, "get_device_module", lambda device: Ampere)
    assert "compute capability 8.9 (Ada, Hopper or later), this has 8.0" in str(fp8_problem(torch.device("cuda:0")))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:0")
    if fp8_problem(device) is not None:
        pytest.skip(str(fp8_problem(device)))
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    check_against_the_emulation(dtype, device)
