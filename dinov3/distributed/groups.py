"""Which of the processes this one is: ranks, world sizes and the subgroup of a multi-distillation student.

Everything also works for one process without a process group, and for a group that somebody else initialised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed import ProcessGroup

# The default group that the subgroups were made from, the subgroup of this process and the ranks of all subgroups. The
# first tells whether the others are still valid: they end with it.
_subgroup: tuple[ProcessGroup, ProcessGroup, list[list[int]]] | None = None


def is_enabled() -> bool:
    """Return whether a default process group exists."""
    return dist.is_available() and dist.is_initialized()


def get_rank(group: ProcessGroup | None = None) -> int:
    """Return the rank of this process in `group` (default: among all processes); 0 without a process group."""
    return dist.get_rank(group) if is_enabled() else 0


def get_world_size(group: ProcessGroup | None = None) -> int:
    """Return the number of processes in `group` (default: all); 1 without a process group."""
    return dist.get_world_size(group) if is_enabled() else 1


def is_main_process(group: ProcessGroup | None = None) -> bool:
    """Return whether this process has rank 0 in `group` (default: among all processes)."""
    return get_rank(group) == 0


def get_default_process_group() -> ProcessGroup | None:
    """Return the group of all processes; None without one."""
    return dist.group.WORLD if is_enabled() else None


def new_subgroups(all_subgroup_ranks: Sequence[Sequence[int]]) -> None:
    """Divide the processes into subgroups; call it once, with the same argument, on all of them.

    Args:
        all_subgroup_ranks: ranks of each subgroup; together they name every rank exactly once.

    Raises:
        RuntimeError: subgroups exist already.
        ValueError: a rank is missing, repeated or too large.
    """
    global _subgroup
    if _current_subgroup() is not None:
        raise RuntimeError("new_subgroups was already called; the processes can be divided only once")
    ranks = sorted(rank for subgroup in all_subgroup_ranks for rank in subgroup)
    if ranks != list(range(get_world_size())):
        raise ValueError(
            f"subgroups {[list(s) for s in all_subgroup_ranks]} must name each of the {get_world_size()} ranks once"
        )
    world = get_default_process_group()
    if world is None:
        return
    for subgroup in all_subgroup_ranks:
        # Every process must take part in making every group, including those that it does not belong to.
        group = dist.new_group(list(subgroup))
        if isinstance(group, ProcessGroup):
            _subgroup = (world, group, [list(ranks) for ranks in all_subgroup_ranks])


def get_process_subgroup() -> ProcessGroup | None:
    """Return the subgroup of this process, by default all processes; None without a process group."""
    return _current_subgroup() or get_default_process_group()


def get_all_subgroup_ranks() -> list[list[int]]:
    """Return the ranks of each subgroup; without `new_subgroups` there is one with all ranks."""
    return _subgroup[2] if _current_subgroup() and _subgroup else [list(range(get_world_size()))]


def get_subgroup_rank() -> int:
    """Return the rank of this process in its subgroup."""
    return get_rank(get_process_subgroup())


def get_subgroup_size() -> int:
    """Return the number of processes in the subgroup of this process."""
    return get_world_size(get_process_subgroup())


def is_subgroup_main_process() -> bool:
    """Return whether this process has rank 0 in its subgroup."""
    return get_subgroup_rank() == 0


def _current_subgroup() -> ProcessGroup | None:
    if _subgroup is None or _subgroup[0] is not get_default_process_group():
        return None
    return _subgroup[1]
