"""Walks over the modules of a network by their dotted names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def named_apply(
    fn: Callable[..., Any],
    module: nn.Module,
    name: str = "",
    depth_first: bool = True,
    include_root: bool = False,
) -> nn.Module:
    """Call `fn(module=..., name=...)` on every descendant of `module`, in registration order.

    Args:
        fn: called with keyword arguments; what it returns is ignored.
        module: the root.
        name: the root's dotted name, a prefix of all others.
        depth_first: children before their parent, otherwise after it.
        include_root: call `fn` on the root too.

    Returns:
        `module`.
    """
    if include_root and not depth_first:
        fn(module=module, name=name)
    for child_name, child in module.named_children():
        named_apply(fn, child, _join(name, child_name), depth_first, include_root=True)
    if include_root and depth_first:
        fn(module=module, name=name)
    return module


def named_replace(
    fn: Callable[..., nn.Module],
    module: nn.Module,
    name: str = "",
    depth_first: bool = True,
    include_root: bool = False,
) -> nn.Module:
    """Replace every descendant of `module` by what `fn(module=..., name=...)` returns for it.

    Args:
        fn: called with keyword arguments; returns the module that takes the place, possibly the same one.
        module: the root, changed in place.
        name: the root's dotted name, a prefix of all others.
        depth_first: children before their parent, otherwise after it (then the children of a replacement are visited).
        include_root: replace the root too.

    Returns:
        The root or its replacement.
    """
    if include_root and not depth_first:
        module = fn(module=module, name=name)
    for child_name, child in list(module.named_children()):
        setattr(module, child_name, named_replace(fn, child, _join(name, child_name), depth_first, include_root=True))
    if include_root and depth_first:
        module = fn(module=module, name=name)
    return module


def count_parameters(module: nn.Module) -> int:
    """Count the elements of all parameters of `module`, trainable or not."""
    return sum(p.numel() for p in module.parameters())


def has_batchnorms(model: nn.Module) -> bool:
    """Return whether `model` has a batch norm of any kind."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(m, kinds) for m in model.modules())


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
