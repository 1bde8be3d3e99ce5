"""Collectives that also work for one process, without a process group, on gloo and with 0-dimensional tensors.

`group=None` means the subgroup of this process (`get_process_subgroup`): all processes, except in multi-distillation.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dinov3.distributed.groups import get_process_subgroup, get_rank, get_world_size

T = TypeVar("T")

_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


def barrier(group: ProcessGroup | None = None) -> None:
    """Wait for the other processes of `group`."""
    group = group or get_process_subgroup()
    if group is not None:
        dist.barrier(group)


def all_reduce(
    tensor: Tensor, op: Literal["sum", "max", "min", "mean"] = "sum", group: ProcessGroup | None = None
) -> Tensor:
    """Reduce `tensor` over the processes of `group`, in place.

    Args:
        tensor: any shape, equal on all ranks; floating point for `"mean"`.
        op: `"sum"`, `"max"`, `"min"` or `"mean"`.
        group: processes to reduce over.

    Returns:
        `tensor`.
    """
    if op not in _OPERATIONS:
        raise ValueError(f"unknown op {op!r}; use one of {', '.join(_OPERATIONS)}")
    group = group or get_process_subgroup()
    if group is None:
        return tensor
    dist.all_reduce(tensor, op=_OPERATIONS[op], group=group)
    if op == "mean":
        tensor /= get_world_size(group)
    return tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.n_rows = len(tensor)
        gathered = tensor.new_empty(get_world_size(group) * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous()
        own = total.new_empty(ctx.n_rows, *total.shape[1:])
        dist.reduce_scatter_tensor(own, total, group=ctx.group)
        return own, None


def all_gather_with_grad(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Concatenate the rows of all ranks, differentiably.

    Args:
        tensor: [b, ...], equal shape on all ranks.
        group: the W processes to gather from.

    Returns:
        [W * b, ...] in rank order. In the backward pass, which every rank must run, each rank receives the sum over all
        ranks of the gradients of its own rows.
    """
    group = group or get_process_subgroup()
    if group is None:
        return tensor
    return cast(Tensor, _AllGather.apply(tensor, group))


def gather_all_tensors(tensor: Tensor, group: ProcessGroup | None = None) -> list[Tensor]:
    """Gather the tensors of all ranks, which may differ in shape but not in number of dimensions.

    Returns:
        One tensor per rank, in rank order.

    Raises:
        ValueError: the ranks' tensors differ in number of dimensions.
    """
    group = group or get_process_subgroup()
    if group is None:
        return [tensor]
    shapes = all_gather_objects(tuple(tensor.shape), group)
    if len({len(shape) for shape in shapes}) > 1:
        raise ValueError(f"cannot gather tensors with different numbers of dimensions; their shapes by rank: {shapes}")
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    padded = tensor.new_zeros(largest)
    padded[_corner(tensor.shape)] = tensor.detach()
    # gloo does not gather 0-dimensional tensors: flatten.
    gathered = [torch.empty_like(padded.reshape(-1)) for _ in shapes]
    dist.all_gather(gathered, padded.reshape(-1), group=group)
    return [flat.reshape(largest)[_corner(shape)] for flat, shape in zip(gathered, shapes, strict=True)]


def broadcast_object(value: T, group: ProcessGroup | None = None) -> T:
    """Return the picklable `value` of the group's rank 0 on every rank."""
    group = group or get_process_subgroup()
    if group is None:
        return value
    holder = [value if get_rank(group) == 0 else None]
    dist.broadcast_object_list(holder, src=dist.get_global_rank(group, 0), group=group)
    return cast(T, holder[0])


def all_gather_objects(value: T, group: ProcessGroup | None = None) -> list[T]:
    """Return the picklable values of all ranks, in rank order."""
    group = group or get_process_subgroup()
    if group is None:
        return [value]
    values: list[Any] = [None] * get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)
