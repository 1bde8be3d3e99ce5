"""Batch norm over processes is batch norm of the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dinov3.distributed.batch_norm import SynchronizedBatchNorm2d, synchronize_batch_norms_
from tests.multiprocess import run_ranks

N_PROCESSES = 3


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2 * N_PROCESSES, 4, 5, 6, generator=generator) + 7


def step(rank: int, world_size: int) -> dict[str, Tensor]:
    """A training step on this process's images, and what it left."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    module[1].weight.data.uniform_(0.5, 2)
    synchronize_batch_norms_(module)
    x = inputs().chunk(world_size)[rank].requires_grad_()
    output = module(x)
    (output * output.detach().roll(1, dims=3)).sum().backward()
    return {
        "output": output.detach(),
        "input gradient": x.grad,
        "weight gradient": module[1].weight.grad,
        "convolution gradient": module[0].weight.grad,
        **dict(module[1].named_buffers()),
        "evaluation": module.eval()(x).detach(),
        "synchronized": torch.tensor(isinstance(module[1], SynchronizedBatchNorm2d)),
    }


@pytest.mark.distributed
def test_processes_normalise_with_the_statistics_of_all() -> None:
    whole = step(0, 1)
    parts = run_ranks(step, N_PROCESSES)
    assert not whole["synchronized"] and all(part["synchronized"] for part in parts)
    for name in ("output", "input gradient", "evaluation"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name], rtol=1e-4, atol=1e-5)
    for name in ("weight gradient", "convolution gradient"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], rtol=1e-3, atol=1e-3)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        for part in parts:
            torch.testing.assert_close(part[name], whole[name], rtol=1e-5, atol=1e-6)


def test_one_process_keeps_its_batch_norm() -> None:
    module = nn.Sequential(nn.BatchNorm2d(2))
    assert type(synchronize_batch_norms_(module)[0]) is nn.BatchNorm2d
