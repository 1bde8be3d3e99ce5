"""Linear layers whose matrix products run in 8-bit floating point (FP8 formats, arXiv 2209.05433).

Notable:
- Both operands are scaled row by row to the range of e4m3 just before each product; weights, activations, results and
  gradients keep their own precision, so that parameters and state dicts are those of the plain layers.
- Scales are applied to the product, in float32, instead of within it: the kernel without them is the faster one.
- The gradient of the input goes through 8 bits, with one scale for the whole weight; that of the weight does not.
- CUDA devices of compute capability 8.9 and later have the products. On the CPU they are there for tests and small
  runs: not fast, but the same numbers.
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
#: Some versions of PyTorch have no 8-bit products on the CPU; float32 ones then give the same numbers.
HAS_CPU_KERNEL = torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm", "CPU")

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


_REPLACEMENTS: dict[type[nn.Module], type[nn.Linear]] = {
    nn.Linear: Fp8Linear,
    LinearKMaskedBias: Fp8LinearKMaskedBias,
}


def convert_linears_to_fp8(root_module: nn.Module, *, filter: str) -> nn.Module:
    """Replace linear layers by such that compute in 8 bits, in place.

    The new layers hold the parameters and buffers of the old ones themselves, under their names.

    Args:
        root_module: its descendants are replaced, never itself.
        filter: regular expression; layers whose dotted name has a match are replaced, with "" all of them.

    Returns:
        `root_module`.

    Raises:
        RuntimeError: a layer's channels are not multiples of 64; nothing has been replaced then.
        AssertionError: no layer matches, or one that does is neither a `nn.Linear` nor a `LinearKMaskedBias`.
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
        # What is compiled already computes with the old layers.
        torch._dynamo.reset_code_caches()
    logger.info("%d linear layers compute in 8 bits (filter %r)", len(linears), filter)
    return root_module


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias with both factors rounded to 8 bits.

    Args:
        x: [..., K], floating point.
        weight: [N, K].
        bias: [N], or None.

    Returns:
        [..., N]: bfloat16, or what bfloat16 and the bias promote to.
    """
    out: Tensor = _Fp8Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], -1)


def fp8_problem(device: torch.device) -> str | None:
    """Why 8-bit products do not run on a device; None if they do."""
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
    """a [M, K] @ b.T [K, N] in bfloat16; the maxima [M, 1] and [N, 1] fill the range of 8 bits."""
    a_scale, b_scale = (maxima.clamp(min=_SMALLEST_MAXIMUM) / _LARGEST for maxima in (a_maxima, b_maxima))
    product = _product((a / a_scale).to(FP8), (b / b_scale).to(FP8).contiguous())
    return (product * a_scale * b_scale.t()).bfloat16()


def _row_maxima(x: Tensor) -> Tensor:
    """The largest absolute value of each row, float32 [M, 1]."""
    return x.abs().amax(dim=-1, keepdim=True).float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type == "cpu" and not HAS_CPU_KERNEL:
        return (a.float() @ b.float().t()).bfloat16()
    return _kernel(a, b)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    one = torch.ones((), device=a.device)
    # The kernel wants its second operand column by column, which is what the transpose of rows is.
    return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


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
