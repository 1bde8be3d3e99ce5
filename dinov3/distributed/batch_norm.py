"""Batch norm over the batches of all processes, on any device.

Notable: `torch.nn.SyncBatchNorm` refuses CPU tensors; this one uses collectives that work everywhere. Several processes
give what one process gives on the whole batch. State-dict entries are those of `BatchNorm2d`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dinov3.distributed.collectives import all_reduce
from dinov3.distributed.groups import get_world_size


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce(gradients[0].clone())


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` that in training uses the statistics of the images [b, C, H, W] of all processes."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [b, C, H, W]; every process must call it, and run its backward pass."""
        if not self.training or get_world_size() == 1:
            return super().forward(input)
        x = input.float()
        count = all_reduce(x.new_tensor(x.numel() / x.shape[1]))
        mean = _SumOverProcesses.apply(x.sum((0, 2, 3))) / count  # [C]
        centred = x - mean[:, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        self._update_running_statistics(mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        normalised = centred * scale[:, None, None]
        return (normalised if self.bias is None else normalised + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), momentum)


def synchronize_batch_norms_(module: nn.Module) -> nn.Module:
    """Make the `BatchNorm2d` of a module use the batches of all processes; nothing changes with one process.

    Returns:
        The same module: its batch norms change their class and keep everything else.
    """
    if get_world_size() > 1:
        for part in module.modules():
            if type(part) is nn.BatchNorm2d:
                part.__class__ = SynchronizedBatchNorm2d
    return module
