"""Sending rows that are spread over the processes to those that need them, and to no others.

Each process has the same number of consecutive rows; no process ever holds all of them. Multi-distillation (arXiv
2508.10104, section 6) exchanges images and teacher outputs in this way: every student sees the whole batch, split among
its own processes, and the teacher's work is split among all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3.distributed.groups import get_all_subgroup_ranks, get_rank, get_world_size, is_enabled


def send_rows(rows: Tensor, n_rows_to: Sequence[int], n_rows_from: Sequence[int]) -> Tensor:
    """Send consecutive rows to each process.

    Args:
        rows: [n, ...], first those for rank 0, then those for rank 1, ...
        n_rows_to: how many go to each of the W ranks.
        n_rows_from: how many come from each of the W ranks.

    Returns:
        The rows from rank 0, then those from rank 1, ...; no gradient flows back.
    """
    rows = rows.detach().contiguous()
    if not is_enabled():
        return rows
    received = rows.new_empty(sum(n_rows_from), *rows.shape[1:])
    dist.all_to_all_single(received, rows, list(n_rows_from), list(n_rows_to))
    return received


def rows_of_ranks(n_rows: int) -> list[range]:
    """Return which of `n_rows` rows each rank needs, if each subgroup splits all of them evenly.

    Raises:
        ValueError: a subgroup cannot split them evenly.
    """
    ranges: dict[int, range] = {}
    for ranks in get_all_subgroup_ranks():
        if n_rows % len(ranks):
            raise ValueError(f"{n_rows} rows cannot be split evenly among the {len(ranks)} processes of a subgroup")
        share = n_rows // len(ranks)
        ranges |= {rank: range(i * share, (i + 1) * share) for i, rank in enumerate(ranks)}
    return [ranges[rank] for rank in range(get_world_size())]


def distribute_to_subgroups(tensor: Tensor, over_dim: int, n_rows: int | None = None) -> Tensor:
    """Give each subgroup the whole of a tensor that is spread over all processes, split among its members.

    Args:
        tensor: this rank's part, of the same shape on all ranks; the whole tensor is their concatenation in rank order.
        over_dim: dimension along which it is spread.
        n_rows: use only so many entries from the start. Default: all.

    Returns:
        On rank r of a subgroup of s: the r-th of s equal parts of the whole, along `over_dim`; no gradient flows back.

    Raises:
        ValueError: it cannot be split evenly, or has fewer entries than `n_rows`.
    """
    rows = tensor.movedim(over_dim, 0)
    n_own, world_size, rank = len(rows), get_world_size(), get_rank()
    total = n_own * world_size if n_rows is None else n_rows
    if total > n_own * world_size:
        raise ValueError(f"{n_rows} rows were requested, but {world_size} processes with {n_own} each have fewer")
    held = [range(r * n_own, (r + 1) * n_own) for r in range(world_size)]
    wanted = rows_of_ranks(total)
    to_ranks = [_overlap(held[rank], of_rank) for of_rank in wanted]
    from_ranks = [len(_overlap(of_rank, wanted[rank])) for of_rank in held]
    outgoing = torch.cat([rows[part.start - held[rank].start : part.stop - held[rank].start] for part in to_ranks])
    return send_rows(outgoing, [len(part) for part in to_ranks], from_ranks).movedim(0, over_dim)


def _overlap(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))
