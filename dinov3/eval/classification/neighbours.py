"""Exact nearest neighbours by dot product, and the weighted vote of their labels.

Notable:
- The product is made in blocks, each reduced to its best K at once, so memory grows neither with the number of training
  rows nor with that of queries.
- A neighbour is one int64 key: the similarity's bits above, the training row (inverted) below. Keys are all different
  and sort by similarity first and lower row second, so ties have one outcome however the work is divided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinov3 import distributed

# A similarity must not depend, in its last bit, on where in a matrix product its two rows stand, or equal rows would
# not tie. BLAS treats the rows that are left over of a block differently, so blocks are padded to whole multiples.
ROW_MULTIPLE = 64
ID_MASK = 0xFFFFFFFF
WORST_KEY = torch.iinfo(torch.int64).min
GROUP = 8
ROWS_PER_NEIGHBOUR_TO_GROUP = 16
VALUES_PER_THREAD = 2**16
MAX_QUERIES_PER_BLOCK = 1024
MAX_ROWS_PER_BLOCK = 32768


def pack(similarities: Tensor, ids: Tensor) -> Tensor:
    """Pack neighbours into keys that sort by similarity, then by lower id.

    Args:
        similarities: float32 [B, n], without NaN.
        ids: int64 [n] or [B, n], in [0, 2^32).

    Returns:
        int64 [B, n]; larger is better.
    """
    # Adding 0 turns -0 into 0. Negative floats sort in reverse order of their bits, so all but the sign are flipped.
    bits = (similarities + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (ID_MASK - ids)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the similarities (float32) and ids (int64) of keys, both in the shape of the keys."""
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), ID_MASK - (keys & ID_MASK)


def search(
    queries: Tensor,
    features: Tensor,
    ids: Tensor,
    k: int,
    *,
    rows_per_block: int = MAX_ROWS_PER_BLOCK,
    dtype: torch.dtype = torch.float32,
    buffer: Tensor | None = None,
) -> Tensor:
    """Find the k training rows with the largest dot product, for each query.

    Args:
        queries: float32 [M, D].
        features: float32 [N, D], on any device.
        ids: int64 [N], what the rows are called in the result; in [0, 2^32); on the device of the queries.
        k: number of neighbours.
        rows_per_block: training rows per matrix product.
        dtype: of the matrix product.
        buffer: memory from `make_buffer` for the similarities, so that several calls share one. Default: a new one.

    Returns:
        Keys (see `pack`) [M, min(k, N)], best first.
    """
    padded = _pad_rows(queries.to(dtype))
    if buffer is None:
        buffer = make_buffer(len(queries), min(rows_per_block, len(features)), dtype, queries.device)
    best: Tensor | None = None
    for block, block_ids in zip(features.split(rows_per_block), ids.split(rows_per_block), strict=True):
        rows = _pad_rows(block.to(queries.device, dtype))
        similarities = buffer[: len(padded) * len(rows)].view(len(padded), len(rows))
        torch.mm(padded, rows.T, out=similarities)
        found = _best_of_block(similarities[: len(queries)].float(), block_ids, k)
        best = found if best is None else _largest_keys(torch.cat([best, found], dim=1), k)
    assert best is not None
    return best


def make_buffer(n_queries: int, n_rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for the similarities of a block: fresh memory of this size costs a third of the product on a CPU."""
    return torch.empty(_round_up(n_queries) * _round_up(n_rows), dtype=dtype, device=device)


def search_sharded(
    queries: Tensor,
    features: Tensor,
    ids: Tensor,
    k: int,
    search_rows: Callable[[Tensor, Tensor, Tensor, int], Tensor] = search,
) -> Tensor:
    """Search training rows that are divided over processes, each with its own queries; every process must call it.

    Args:
        queries: float32 [M, D], this process's; M may differ, and be 0.
        features: float32 [n, D], this process's training rows; n may differ, and be 0.
        ids: int64 [n], of these rows among those of all processes.
        k: number of neighbours, at most the number of training rows of all processes.
        search_rows: `search`, possibly with settings bound to it.

    Returns:
        Keys [M, k] of this process's queries among all training rows, best first.
    """
    gathered = distributed.gather_all_tensors(queries)
    found = search_rows(torch.cat(gathered), features, ids, k)
    found = F.pad(found, (0, k - found.shape[1]), value=WORST_KEY)
    n_processes = len(gathered)
    received = found.new_empty(n_processes * len(queries), k)
    if n_processes > 1:
        dist.all_to_all_single(received, found, [len(queries)] * n_processes, [len(rows) for rows in gathered])
    else:
        received = found
    return _largest_keys(received.view(n_processes, len(queries), k).transpose(0, 1).flatten(1), k)


def vote(
    keys: Tensor, class_lists: Tensor, *, ks: Sequence[int], temperature: float, num_classes: int
) -> dict[int, Tensor]:
    """Score each class by the sum of the weights of those of the first k neighbours that carry it.

    The weights are one softmax of similarity / temperature over all neighbours given, whatever k.

    Args:
        keys: neighbours [B, K], best first.
        class_lists: int64 [N, A], the classes of every training row, padded with `num_classes`.
        ks: numbers of neighbours that vote.
        temperature: divides the similarities.
        num_classes: C.

    Returns:
        float32 [B, C] by k, in ascending order of k.
    """
    similarities, ids = unpack(keys)
    weights = (similarities / temperature).softmax(dim=1)
    classes = class_lists[ids]  # [B, K, A]
    # The last column collects the padding of the class lists.
    scores = weights.new_zeros(len(keys), num_classes + 1)
    result = {}
    counted = 0
    for k in sorted(ks):
        new = classes[:, counted:k]
        scores.scatter_add_(1, new.flatten(1), weights[:, counted:k, None].expand_as(new).flatten(1))
        result[k] = scores[:, :num_classes].clone()
        counted = k
    return result


def make_class_lists(labels: Tensor, num_classes: int) -> Tensor:
    """List the classes of each row.

    Args:
        labels: classes [N], or multi-hot [N, C], integers.
        num_classes: C.

    Returns:
        int64 [N, A], A the largest number of classes of a row (at least 1), padded with C.
    """
    if labels.ndim == 1:
        return labels.long()[:, None]
    rows, classes = labels.nonzero(as_tuple=True)
    per_row = rows.bincount(minlength=len(labels))
    position = torch.arange(len(rows), device=labels.device) - (per_row.cumsum(0) - per_row)[rows]
    width = max(1, int(per_row.max())) if len(labels) else 1
    lists = torch.full((len(labels), width), num_classes, device=labels.device)
    lists[rows, position] = classes
    return lists


def block_sizes(
    memory_bytes: int, *, dim: int, n_neighbours: int, n_votes: int, score_bytes: int, n_processes: int = 1
) -> tuple[int, int]:
    """Choose the largest blocks of queries and training rows whose temporaries fit a memory budget.

    Args:
        memory_bytes: the budget.
        dim: D.
        n_neighbours: K.
        n_votes: K * A, labels that vote per query.
        score_bytes: bytes of the class scores of one query.
        n_processes: number of processes that search the queries of all of them.

    Returns:
        (queries of each process, training rows), multiples of 64 and at least 64, even if that exceeds the budget.
    """
    # Half of the budget is for what grows only with queries, half for their similarities to a block of rows.
    per_query = 8 * dim + 40 * n_neighbours + 24 * n_votes + score_bytes
    queries = _clamp(memory_bytes // 2 // per_query // n_processes, MAX_QUERIES_PER_BLOCK)
    return queries, _clamp(memory_bytes // 2 // (8 * queries * n_processes), MAX_ROWS_PER_BLOCK)


def _clamp(count: int, largest: int) -> int:
    return min(max(count // ROW_MULTIPLE, 1) * ROW_MULTIPLE, largest)


def _round_up(count: int) -> int:
    return count + -count % ROW_MULTIPLE


def _pad_rows(matrix: Tensor) -> Tensor:
    missing = -len(matrix) % ROW_MULTIPLE
    return F.pad(matrix, (0, 0, 0, missing)) if missing else matrix


def _best_of_block(similarities: Tensor, ids: Tensor, k: int) -> Tensor:
    # The best keys, sorted, of a block whose columns beyond its ids are padding; overwrites the padding.
    n_rows = len(ids)
    if n_rows <= k:
        return _largest_keys(pack(similarities[:, :n_rows], ids), k)
    similarities[:, n_rows:] = -torch.inf
    columns = _largest_columns(similarities, k + 1)
    keys = _largest_keys(pack(similarities.gather(1, columns), ids[columns]), k + 1)
    # Where the last one taken equals the first one left out, any of the equal ones may have been selected.
    tied = (keys[:, k - 1] >> 32) == (keys[:, k] >> 32)
    for rows in tied.nonzero()[:, 0].split(ROW_MULTIPLE):
        keys[rows, :k] = _largest_keys(pack(similarities[rows, :n_rows], ids), k)
    return keys[:, :k]


def _largest_columns(similarities: Tensor, k: int) -> Tensor:
    # The columns of the k largest of each row, in any order.
    n_queries, n_columns = similarities.shape
    if n_columns < ROWS_PER_NEIGHBOUR_TO_GROUP * k:
        return _largest(similarities, k)
    # The k largest are in the k groups of columns with the largest maxima. Column j * n_groups + i is in group i.
    groups = similarities.view(n_queries, GROUP, n_columns // GROUP)
    best = _largest(groups.amax(dim=1), k)
    places = _largest(groups.gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1), k)
    return (places // k) * groups.shape[2] + best.gather(1, places % k)


def _largest(values: Tensor, k: int) -> Tensor:
    if not values.is_cpu:
        return values.topk(k, sorted=False).indices
    return _by_rows(lambda part: np.argpartition(part, -k, axis=1)[:, -k:], values)


def _largest_keys(keys: Tensor, k: int) -> Tensor:
    k = min(k, keys.shape[1])
    return _by_rows(lambda part: np.sort(part, axis=1)[:, ::-1][:, :k], keys) if keys.is_cpu else keys.topk(k).values


def _by_rows(select: Callable[[NDArray[Any]], NDArray[Any]], values: Tensor) -> Tensor:
    # NumPy selects and sorts 3 to 10 times faster than torch on a CPU, but in one thread.
    parts = np.array_split(values.numpy(), min(torch.get_num_threads(), max(1, values.numel() // VALUES_PER_THREAD)))
    with ThreadPoolExecutor(len(parts)) as threads:
        selected = list((threads.map if len(parts) > 1 else map)(select, parts))
    return torch.from_numpy(np.concatenate(selected))
