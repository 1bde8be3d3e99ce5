"""Linear layers whose matrix products run in 8-bit floating point (FP8 formats, arXiv 2209.05433).

Notable:
- Both operands are scaled row by row to the range of e4m3 just before each product; weights, activations, results and
  gradients keep their own precision, so that parameters and state dicts are those of the plain layers.
- The gradient of the input goes through 8 bits, with one scale for the whole weight; that of the weight does not.
- CUDA devices of compute capability 8.9 and later have the products. On the CPU, for tests and small runs, the rounded
  operands are multiplied in float32, which gives the same numbers.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.layers.attention import LinearKMaskedBias
from dinov3.utils import named_replace

logger = logging.getLogger("dinov3")

FP8 = torch.float8_e4m3fn
ALIGNMENT = 64
NEEDED_CAPABILITY = (8, 9)  # Ada and Hopper are the first with 8-bit matrix products

_LARGEST = torch.finfo(FP8).max  # 448
_SMALLEST_MAXIMUM = 1e-12  # rows of zeros stay zeros


class Fp8Linear(nn.Linear):
    """`nn.Linear` with 8-bit products; see `fp8_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return fp8_linear(x, self.weight, self.bias)


class Fp8LinearKMaskedBias(LinearKMaskedBias):
    """`LinearKMaskedBias` with 8-bit products; see `fp8_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        bias = None if self.bias is None else self.bias * self.bias_mask.to(self.bias.dtype)
        return fp8_linear(x, self.weight, bias)


_REPLACEMENTS: dict[type[nn.Module], type[nn.Linear]] = {nn.Linear: Fp8Linear, LinearKMaskedBias: Fp8LinearKMaskedBias}


def convert_linears_to_fp8(root_module: nn.Module, *, filter: str) -> nn.Module:
    """Replace linear layers with ones that compute in 8 bits, in place.

    The new layers share the parameters and buffers of the old ones, under the same names.

    Args:
        root_module: its descendants are replaced, never the module itself.
        filter: regular expression; layers whose dotted name has a match are replaced, with "" all of them.

    Returns:
        `root_module`.

    Raises:
        RuntimeError: a layer's channels are not multiples of 64; then nothing has been replaced.
        AssertionError: no layer matches, or a match is neither an `nn.Linear` nor a `LinearKMaskedBias`.
    """
    linears = {
        name: module
        for name, module in root_module.named_modules(remove_duplicate=False)
        if name and isinstance(module, nn.Linear) and re.search(filter, name)
    }
    if not linears:
        raise AssertionError(
            f"no linear layer of {type(root_module).__name__} has a name that matches {filter!r}; "
            'the filter "" takes all of them'
        )
    for name, linear in linears.items():
        _check_layer(name, linear)

    def replace(module: nn.Module, name: str) -> nn.Module:
        return _as_fp8(linears[name]) if name in linears else module

    named_replace(replace, root_module)
    if "torch._dynamo" in sys.modules:
        # Code that is compiled already would still call the old layers.
        torch._dynamo.reset_code_caches()
    logger.info("%d linear layers compute in 8 bits (filter %r)", len(linears), filter)
    return root_module


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias with both factors rounded to 8 bits.

    Args:
        x: [..., K], floating point.
        weight: [N, K].
        bias: [N], or None.

    Returns:
        [..., N], in the dtype to which bfloat16 and that of the bias promote.
    """
    out: Tensor = _Fp8Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], -1)


def fp8_problem(device: torch.device) -> str | None:
    """Say why 8-bit products do not run on a device; None if they do."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"8-bit matrix products need an NVIDIA GPU or the CPU, not a device of type {device.type!r}"
    capability = torch.get_device_module(device).get_device_capability(device)
    if capability < NEEDED_CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (capability, NEEDED_CAPABILITY))
        return f"8-bit matrix products need a GPU of compute capability {need} (Ada, Hopper or later), this has {have}"
    return None


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight_maxima = _row_maxima(weight)
        ctx.save_for_backward(x, weight, weight_maxima.amax())
        out = _scaled_product(x, _row_maxima(x), weight, weight_maxima)
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight, weight_maximum = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            maxima = weight_maximum.expand(weight.shape[1], 1)
            grad_x = _scaled_product(grad, _row_maxima(grad), weight.t(), maxima).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dtype = torch.promote_types(grad.dtype, x.dtype)
            grad_weight = (grad.to(dtype).t() @ x.to(dtype)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias


def _scaled_product(a: Tensor, a_maxima: Tensor, b: Tensor, b_maxima: Tensor) -> Tensor:
    """Multiply a [M, K] by b.T [K, N] in 8 bits, whose range the maxima [M, 1] and [N, 1] fill; bfloat16 [M, N]."""
    a_scale, b_scale = (maxima.clamp(min=_SMALLEST_MAXIMUM) / _LARGEST for maxima in (a_maxima, b_maxima))
    a8, b8 = (a / a_scale).to(FP8), (b / b_scale).to(FP8).contiguous()
    if a8.device.type == "cpu":
        product = (a8.float() @ b8.float().t()).bfloat16()
    else:
        # The kernel without scales is faster than the one with them. It wants its second operand column by column,
        # which is what the transpose of rows is.
        one = torch.ones((), device=a8.device)
        product = torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return (product * a_scale * b_scale.t()).bfloat16()


def _row_maxima(x: Tensor) -> Tensor:
    """Return the largest absolute value of each row, float32 [M, 1]."""
    return x.abs().amax(dim=-1, keepdim=True).float()


def _check_layer(name: str, linear: nn.Linear) -> None:
    if type(linear) not in _REPLACEMENTS:
        raise AssertionError(
            f"{name} is a {type(linear).__name__}: only nn.Linear and LinearKMaskedBias can compute in 8 bits; "
            "change the filter so that it does not match"
        )
    if linear.in_features % ALIGNMENT or linear.out_features % ALIGNMENT:
        raise RuntimeError(
            f"{name} has {linear.in_features} input and {linear.out_features} output channels: 8-bit products need "
            f"multiples of {ALIGNMENT}; change the filter so that it does not match, or the width of the model"
        )


def _as_fp8(linear: nn.Linear) -> nn.Linear:
    has_bias = linear.bias is not None
    new = _REPLACEMENTS[type(linear)](linear.in_features, linear.out_features, bias=has_bias, device="meta")
    for name, parameter in linear.named_parameters(recurse=False):
        setattr(new, name, parameter)
    for name, buffer in linear.named_buffers(recurse=False):
        setattr(new, name, buffer)
    return new.train(linear.training)
