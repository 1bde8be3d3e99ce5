"""What a model costs: parameters and arithmetic of each of its modules, tokens, and memory.

Notable:
- Nothing is computed and no memory is needed, whatever the size of the model: PyTorch counts the operations of a
  forward pass on the meta device.
- The memory of activations is an estimate: the tensors of a forward pass in PyTorch's eager mode, followed from their
  creation to their end. It does not include what kernels and the allocator take besides.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dinov3.models.convnext import N_STAGES, STEM_STRIDE, ConvNeXt
from dinov3.utils import count_parameters
from dinov3.utils.integers import as_pair

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Tokens:
    """What a backbone makes of one image.

    Attributes:
        n_class: class tokens; in a ConvNeXt the mean of the last map.
        n_storage: storage tokens (registers).
        grid: (rows, columns) of patch tokens.
        channels: D, of each token.
    """

    n_class: int
    n_storage: int
    grid: tuple[int, int]
    channels: int

    @property
    def total(self) -> int:
        """Tokens of one image."""
        return self.n_class + self.n_storage + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Memory:
    """Bytes that a model takes.

    Attributes:
        weights: parameters and buffers.
        forward: estimate of the largest sum of tensors alive at once in a forward pass without gradients, images and
            results included.
        backward: estimate of the tensors that a forward pass with gradients keeps for the backward pass, weights not
            included.
    """

    weights: int
    forward: int
    backward: int


def patch_stride(model: Any) -> int:
    """Return the pixels between the tokens of `forward_features`: the patch of a ViT, the last stride of a ConvNeXt."""
    return STEM_STRIDE * 2 ** (N_STAGES - 1) if isinstance(model, ConvNeXt) else int(model.patch_size)


def count_tokens(model: Any, image_size: Size = 224) -> Tokens:
    """Count the tokens of one image.

    Args:
        model: a backbone.
        image_size: side, or (H, W), in pixels.

    Raises:
        ValueError: the image is smaller than a patch.
    """
    (height, width), stride = as_pair(image_size), patch_stride(model)
    if min(height, width) < stride:
        raise ValueError(
            f"an image of {height} x {width} pixels is smaller than a patch: {type(model).__name__} needs sides of at "
            f"least {stride} pixels"
        )
    return Tokens(1, model.n_storage_tokens, (height // stride, width // stride), model.embed_dim)


def count_flops(model: nn.Module, image_size: Size = 224, in_chans: int = 3) -> int:
    """Count the floating-point operations of one forward pass of one image; a multiply-add counts as two.

    Args:
        model: takes images [1, in_chans, H, W]; may be on the meta device.
        image_size: side, or (H, W), in pixels.
        in_chans: channels of the image.

    Returns:
        Operations of matrix products, convolutions and attention; the small rest is not counted.
    """
    return flops_by_module(model, image_size, in_chans)[""]


def flops_by_module(model: nn.Module, image_size: Size = 224, in_chans: int = 3) -> dict[str, int]:
    """Count the operations of each module that is called, by its dotted name; those of the model itself are `[""]`."""
    on_meta = _copy_structure(model, "meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta(torch.empty(1, in_chans, *as_pair(image_size), device="meta"))
    root = type(model).__name__
    found = {
        name.removeprefix(root).removeprefix("."): sum(operations.values())
        for name, operations in counter.get_flop_counts().items()
        if name == root or name.startswith(f"{root}.")
    }
    return found | {"": counter.get_total_flops()}


def estimate_memory(
    model: nn.Module,
    image_size: Size = 224,
    in_chans: int = 3,
    *,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Memory:
    """Estimate the memory of a model, without using any.

    Args:
        model: takes images [B, in_chans, H, W]; may be on the meta device.
        image_size: side, or (H, W), in pixels.
        in_chans: channels of the images.
        batch_size: B.
        dtype: of parameters and images; buffers keep theirs.

    Returns:
        Bytes; see `Memory` for what is estimated.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # Takes a second to import, and has no public name.

    with FakeTensorMode():
        fake = _copy_structure(model, "cpu", dtype)
        images = torch.empty(batch_size, in_chans, *as_pair(image_size), dtype=dtype)
        weights = {_storage_id(tensor): _n_bytes(tensor) for tensor in chain(fake.parameters(), fake.buffers())}
        with torch.no_grad(), _LiveTensors(ignored=set(weights)) as tracker:
            fake(images)
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            saved[_storage_id(tensor)] = _n_bytes(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            # Kept, because its graph keeps the saved tensors alive, and a freed storage's id would be used again.
            result = fake(images)
        del result
    return Memory(
        weights=sum(weights.values()),
        forward=tracker.peak + _n_bytes(images),
        backward=sum(n_bytes for storage, n_bytes in saved.items() if storage not in weights),
    )


def module_table(model: nn.Module, flops: Mapping[str, int], *, max_depth: int = 2) -> str:
    """Format a table of the modules with their parameters and operations for one image.

    Equal neighbours, such as the blocks of a transformer, share a row, which shows the cost of each.

    Args:
        model: may be on the meta device.
        flops: as returned by `flops_by_module`.
        max_depth: levels of sub-modules; 0 is only the model.

    Returns:
        Text of several lines.
    """
    parameters: Counter[str] = Counter()
    for name, parameter in model.named_parameters():  # Each once, even if two modules share it.
        parts = name.split(".")
        parameters.update({".".join(parts[:depth]): parameter.numel() for depth in range(len(parts))})
    costs: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # A list of modules is never called itself.
        called = [name] if name in flops else [f"{name}.{child}" for child, _ in module.named_children()]
        costs[name] = parameters[name], sum(flops.get(child, 0) for child in called)
    rows = [("module", "", "parameters", "GFLOP"), *_rows("", type(model).__name__, model, costs, max_depth)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {parameters:>{widths[2]}}  {gflop:>{widths[3]}}"
        for name, kind, parameters, gflop in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summarize(model: nn.Module, image_size: Size = 224, in_chans: int = 3, max_depth: int = 1) -> str:
    """Format a line with the totals, and a table of parameters and operations by sub-module.

    Args:
        model: takes images [1, in_chans, H, W]; may be on the meta device.
        image_size: side, or (H, W), in pixels, of the image that operations are counted for.
        in_chans: channels of the image.
        max_depth: levels of sub-modules in the table.

    Returns:
        Text of several lines.
    """
    height, width = as_pair(image_size)
    flops = flops_by_module(model, image_size, in_chans)
    return (
        f"{type(model).__name__}: {count_parameters(model) / 1e6:.1f} M parameters, "
        f"{flops[''] / 1e9:.2f} GFLOP for one image of {height} x {width} pixels\n"
        f"{module_table(model, flops, max_depth=max_depth)}"
    )


def _rows(
    name: str, label: str, module: nn.Module, costs: Mapping[str, tuple[int, int]], depth: int
) -> Iterator[tuple[str, str, str, str]]:
    parameters, flops = costs[name]
    yield label, type(module).__name__, f"{parameters:,}", f"{flops / 1e9:.3f}"
    if depth == 0:
        return
    children = [(child, f"{name}.{child}".lstrip("."), below) for child, below in module.named_children()]
    children = [entry for entry in children if any(costs[entry[1]])]
    indent = " " * (len(label) - len(label.lstrip())) + "  "
    for _, group in groupby(children, lambda entry: (type(entry[2]), entry[0].isdigit(), costs[entry[1]])):
        equal = list(group)
        first, full_name, below = equal[0]
        if len(equal) > 1 and first.isdigit():
            yield from _rows(full_name, f"{indent}{first} to {equal[-1][0]}, each", below, costs, depth - 1)
        else:
            for child, full_name, below in equal:
                yield from _rows(full_name, indent + child, below, costs, depth - 1)


class _LiveTensors(TorchDispatchMode):
    """Follows the storages that operations make until they are freed; `peak` is the most bytes alive at once."""

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._known = set(ignored)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else (result,):
            if isinstance(output, Tensor) and _storage_id(output) not in self._known:
                key, n_bytes = _storage_id(output), _n_bytes(output)
                self._known.add(key)
                self._alive += n_bytes
                self.peak = max(self.peak, self._alive)
                weakref.finalize(output.untyped_storage(), self._drop, key, n_bytes)
        return result

    def _drop(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self._alive -= n_bytes


def _copy_structure(model: nn.Module, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    # deepcopy takes new, empty tensors from the memo instead of copying gigabytes.
    memo: dict[int, Any] = {
        id(buffer): torch.empty(buffer.shape, dtype=buffer.dtype, device=device) for buffer in model.buffers()
    }
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, dtype=dtype or parameter.dtype, device=device)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo).eval()


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _n_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
