"""Process groups and collectives that work the same for one process and for many, on the CPU and on GPUs."""

from __future__ import annotations

from dinov3.distributed.collectives import (
    all_gather_objects,
    all_gather_with_grad,
    all_reduce,
    barrier,
    broadcast_object,
    gather_all_tensors,
)
from dinov3.distributed.environment import TorchDistributedEnvironment
from dinov3.distributed.exchange import distribute_to_subgroups, rows_of_ranks, send_rows
from dinov3.distributed.groups import (
    get_all_subgroup_ranks,
    get_default_process_group,
    get_process_subgroup,
    get_rank,
    get_subgroup_rank,
    get_subgroup_size,
    get_world_size,
    is_enabled,
    is_main_process,
    is_subgroup_main_process,
    new_subgroups,
)
from dinov3.distributed.setup import disable, enable

__all__ = [
    "TorchDistributedEnvironment",
    "all_gather_objects",
    "all_gather_with_grad",
    "all_reduce",
    "barrier",
    "broadcast_object",
    "disable",
    "distribute_to_subgroups",
    "enable",
    "gather_all_tensors",
    "get_all_subgroup_ranks",
    "get_default_process_group",
    "get_process_subgroup",
    "get_rank",
    "get_subgroup_rank",
    "get_subgroup_size",
    "get_world_size",
    "is_enabled",
    "is_main_process",
    "is_subgroup_main_process",
    "new_subgroups",
    "rows_of_ranks",
    "send_rows",
]
