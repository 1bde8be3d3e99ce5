"""Sharding backbones and heads with FSDP2 (`fully_shard`), and gradients and state dicts of sharded modules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dinov3.distributed import get_default_process_group, is_subgroup_main_process


def make_mesh(group: ProcessGroup | None, device: torch.device) -> DeviceMesh:
    """Make a one-dimensional mesh over `group`, by default over all processes."""
    group = group or get_default_process_group()
    assert group is not None, "sharding needs a process group"
    return DeviceMesh.from_group(group, device.type)


def shard_backbone(backbone: nn.Module, parts: list[nn.Module], mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shard each part, then the rest of the backbone, gathering the next part while one computes.

    Args:
        parts: submodules of `backbone` in the order of the forward pass.
        mesh: processes to shard over.
        policy: precision of parameters and gradient reduction.
    """
    # Features are views of one tensor, and nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Each process draws the weights of its shards with its own seed; that is all that torch falls back to.
    warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support on cpu")
    sharded = [fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True) for part in parts]
    for part, next_part in pairwise(sharded):
        part.set_modules_to_forward_prefetch([next_part])
        next_part.set_modules_to_backward_prefetch([part])
    fully_shard(backbone, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if hasattr(backbone, "get_intermediate_layers"):
        register_fsdp_forward_method(backbone, "get_intermediate_layers")


def average_gradients(networks: nn.ModuleDict, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Make the gradients of sharded networks means over the processes of `mesh`, where FSDP leaves sums."""
    # In float16 FSDP divides by itself. Otherwise it asks for the mean, but gloo of PyTorch 2.7 and 2.8 sums.
    if policy.reduce_dtype == torch.float16 or _returns_means(mesh):
        return

    def divide(gradients: Tensor) -> None:
        gradients /= mesh.size()

    for module in networks.modules():
        if isinstance(module, FSDPModule):
            module.set_all_reduce_hook(divide)


def _returns_means(mesh: DeviceMesh) -> bool:
    group, ones = mesh.get_group(), torch.ones(mesh.size(), device=mesh.device_type)
    mean = torch.empty(1, device=mesh.device_type)
    dist.reduce_scatter_tensor(mean, ones, op=dist.ReduceOp.AVG, group=group)
    return mean.item() == 1


def shard_after_forward(networks: nn.ModuleDict) -> None:
    """Make sharded, frozen networks drop their whole parameters after each forward pass."""
    # Before PyTorch 2.8, FSDP keeps those of the outermost modules until a backward pass, whatever it is asked for.
    for network in networks.values():
        if isinstance(network, FSDPModule) and torch.__version__ < "2.8":
            network.register_forward_hook(lambda network, *_: network.reshard())


def set_gradient_sync(networks: nn.ModuleDict, is_on: bool) -> None:
    """Let the next backward pass of sharded networks sum gradients over the processes, or keep them for a later one.

    Args:
        networks: backbone and heads, each sharded on its own or plain.
        is_on: sum them, including those that were kept.
    """
    for network in networks.values():
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(is_on)


def clip_grad_norm_(parameters: nn.Module | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients so that their total 2-norm is at most `max_norm`; sharded or not.

    Args:
        parameters: a module, or parameters that are all sharded alike.
        max_norm: infinity only measures.

    Returns:
        The total norm before scaling, 0-dim, of the whole gradients: equal on all ranks that share the parameters.
    """
    parameters = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not math.isinf(max_norm):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Gather the whole tensors of a plain or sharded module; all ranks that share it call this.

    Returns:
        CPU copies by name, in rank 0 of the subgroup; empty elsewhere.
    """
    is_main = is_subgroup_main_process()
    full: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if is_main:
            full[name] = torch.empty_like(whole, device="cpu").copy_(whole)
    return full
