"""Backbones prepared for inference, where nothing needs a gradient or another dtype later.

Notable:
- Under autocast a model with float32 weights casts each of them at every call. For few images this takes longer than
  all norms and rotations together; `optimize` casts once, and the model computes the same without autocast.
- On CPUs the weights of linears are packed once into the blocks in which oneDNN multiplies them, and the GELU is
  applied to each block of a product while it is in the cache. Without oneDNN the GELU overwrites its input, because
  most of its time would go into fresh memory for its output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.layers import LinearKMaskedBias

Model = TypeVar("Model", bound=nn.Module)

_LOW = (torch.bfloat16, torch.float16)


def optimize(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Make a ViT or ConvNeXt faster, for inference only; its features stay the same except for rounding.

    Linears, convolutions and activations are replaced, so the weights can no longer be trained, loaded, saved or moved
    to another device: `state_dict`, `load_state_dict`, `copy.deepcopy` and pickling raise. The calls stay the same.

    Args:
        model: in evaluation mode, on its device; changed in place.
        dtype: `torch.bfloat16` or `torch.float16` to compute what autocast of that dtype would, without autocast:
            products are computed in it, from weights that are cast now and take half the memory; everything else stays
            in the dtype of the model. Default: the dtype of the model.

    Returns:
        The model.

    Raises:
        ValueError: the model is in training mode, or the dtype is none of these.
    """
    if model.training:
        raise ValueError("optimize prepares models for inference, but this one is in training mode: call eval() first")
    if dtype is not None and dtype not in _LOW:
        raise ValueError(f"dtype must be torch.bfloat16, torch.float16 or None, got {dtype!r}")
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, _make_linear(child, dtype))
            elif isinstance(child, nn.Conv2d):
                options: Any = {key: getattr(child, key) for key in ("stride", "padding", "dilation", "groups")}
                convolve = functools.partial(F.conv2d, **options)
                setattr(parent, name, _Layer(convolve, _cast(child.weight, dtype), _cast(child.bias, dtype)))
        _join_gelu(parent)
    return model.requires_grad_(False)


class _OptimizedLayer(nn.Module):
    """A layer that refuses whatever would store or copy its weights, also as a part of a larger model."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _cannot("copied or pickled")

    def _save_to_state_dict(self, *args: Any) -> None:
        # A packed weight would be missing in the file, and the mask of a bias is multiplied into it.
        raise _cannot("saved: it has no state dict")

    def _load_from_state_dict(self, *args: Any) -> None:
        raise _cannot("filled from a state dict")


def _cannot(verb: str) -> RuntimeError:
    return RuntimeError(
        f"a model after optimize() cannot be {verb}, because its weights are packed for this processor or merged with "
        "others. Save, load or copy the model before optimize(), and optimize each copy"
    )


class _Layer(_OptimizedLayer):
    """A linear or a convolution that is not trained."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, function: Callable[..., Tensor], weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function with weight and bias, in the dtype of the weight."""
        return self.function(x.to(self.weight.dtype), self.weight, self.bias)


class _PackedLinear(_OptimizedLayer):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.dtype = weight.dtype
        # Not buffers, because a packed weight cannot be moved or cast.
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), bias
        self.activation = "none"

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features] and apply the activation, in the dtype of the weight."""
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.weight, self.bias, self.activation, [], "none" if self.activation == "gelu" else ""
        )


class _OverwritingGELU(nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        """Overwrite the input with its GELU."""
        return torch.ops.aten.gelu_(input, approximate=self.approximate)


def _make_linear(linear: nn.Linear, dtype: torch.dtype | None) -> nn.Module:
    bias: Tensor | None = linear.bias
    if isinstance(linear, LinearKMaskedBias) and bias is not None:
        bias = bias * linear.bias_mask.to(bias.dtype)
    weight, bias = _cast(linear.weight, dtype), _cast(bias, dtype)
    return _PackedLinear(weight, bias) if _can_be_packed(weight) else _Layer(F.linear, weight, bias)


def _can_be_packed(weight: Tensor) -> bool:
    # PyTorch's compiler emits these operators, but they are not part of its public interface, so they may be missing.
    operators = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if weight.device.type != "cpu" or not all(hasattr(torch.ops.mkldnn, name) for name in operators):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    is_bf16 = weight.dtype == torch.bfloat16
    return weight.dtype == torch.float32 or (is_bf16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _join_gelu(parent: nn.Module) -> None:
    """Make the linear before a GELU apply it, in an `Mlp` or a block of a ConvNeXt."""
    act = getattr(parent, "act", None)
    before = getattr(parent, "fc1", getattr(parent, "pwconv1", None))
    if type(act) is not nn.GELU or before is None:
        return
    if isinstance(before, _PackedLinear) and act.approximate == "none":
        before.activation, parent.act = "gelu", nn.Identity()
    else:
        parent.act = _OverwritingGELU(act.approximate)


def _cast(tensor: Any, dtype: torch.dtype | None) -> Any:
    return None if tensor is None else tensor.detach().to(dtype or tensor.dtype)
