"""Exact nearest neighbours by dot product, and the weighted vote of their labels.

Notable:
- The product is made in blocks, each reduced to its best K at once, so memory depends neither on the number of training
  rows nor on that of queries.
- A neighbour is one int64 key: the similarity's bits above, the training row (inverted) below. Keys are all different
  and sort by similarity first and lower row second, so ties have one outcome however the work is divided.
- Blocks are padded to multiples of 64 rows: then a similarity does not depend, in its last bit, on where in a matrix
  product its two rows stand (BLAS treats the rows that are left over differently), and equal rows do tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dinov3 import distributed

ROW_MULTIPLE = 64
ID_MASK = 0xFFFFFFFF
WORST_KEY = torch.iinfo(torch.int64).min
GROUP = 8
ROWS_PER_NEIGHBOUR_TO_GROUP = 64
MAX_QUERIES_PER_BLOCK = 1024
MAX_ROWS_PER_BLOCK = 32768


def pack(similarities: Tensor, ids: Tensor) -> Tensor:
    """Keys that sort by similarity, then by lower id.

    Args:
        similarities: float32 [B, n], without NaN.
        ids: int64 [n] or [B, n], in [0, 2^32).

    Returns:
        int64 [B, n]; larger is better.
    """
    # Adding 0 turns -0 into 0. Negative floats sort against their bits: all but the sign are flipped.
    bits = (similarities + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (ID_MASK - ids)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The similarities (float32) and ids (int64) of keys, both of their shape."""
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
) -> Tensor:
    """The k training rows with the largest dot product, for each query.

    Args:
        queries: float32 [M, D].
        features: float32 [N, D], on any device.
        ids: int64 [N], what the rows are called in the result; in [0, 2^32); on the device of the queries.
        k: number of neighbours.
        rows_per_block: training rows per matrix product.
        dtype: of the matrix product.

    Returns:
        Keys (see `pack`) [M, min(k, N)], best first.
    """
    best = queries.new_empty(len(queries), 0, dtype=torch.int64)
    padded = pad_rows(queries.to(dtype))
    for block, block_ids in zip(features.split(rows_per_block), ids.split(rows_per_block), strict=True):
        similarities = padded @ pad_rows(block.to(queries.device, dtype)).T
        found = _best_of_block(similarities[: len(queries), : len(block)].float(), block_ids, k)
        best = torch.cat([best, found], dim=1)
        best = best.topk(min(k, best.shape[1])).values
    return best


def search_sharded(
    queries: Tensor,
    features: Tensor,
    ids: Tensor,
    k: int,
    search_rows: Callable[[Tensor, Tensor, Tensor, int], Tensor] = search,
) -> Tensor:
    """`search` where each process has other training rows and other queries; every process must call it.

    Args:
        queries: float32 [M, D], this process's; M may differ, and be 0.
        features: float32 [n, D], this process's training rows; n may differ, and be 0.
        ids: int64 [n], of these rows among those of all processes.
        k: number of neighbours, at most the number of training rows of all processes.
        search_rows: `search` with settings, or another that returns the same keys.

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
    return received.view(n_processes, len(queries), k).transpose(0, 1).flatten(1).topk(k).values


def vote(
    keys: Tensor, class_lists: Tensor, *, ks: Sequence[int], temperature: float, num_classes: int
) -> dict[int, Tensor]:
    """Class scores: the sum of the weights of the first k neighbours that carry the class.

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
    # One column more, for the padding.
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
    """The classes of each row as lists.

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
    """Queries and training rows per block whose temporaries fit a budget, not below 64 each.

    Args:
        memory_bytes: the budget.
        dim: D.
        n_neighbours: K.
        n_votes: K * A, labels that vote per query.
        score_bytes: bytes of the class scores of one query.
        n_processes: how many search all their queries together.

    Returns:
        (queries of each process, training rows), multiples of 64.
    """
    # Half of the budget for what grows with queries alone, half for their similarities to a block of rows.
    per_query = 8 * dim + 40 * n_neighbours + 24 * n_votes + score_bytes
    queries = _clamp(memory_bytes // 2 // per_query // n_processes, MAX_QUERIES_PER_BLOCK)
    return queries, _clamp(memory_bytes // 2 // (8 * queries * n_processes), MAX_ROWS_PER_BLOCK)


def _clamp(count: int, largest: int) -> int:
    return min(max(count // ROW_MULTIPLE, 1) * ROW_MULTIPLE, largest)


def pad_rows(matrix: Tensor) -> Tensor:
    """The matrix [n, D] with rows of zeros up to a multiple of 64."""
    missing = -len(matrix) % ROW_MULTIPLE
    return F.pad(matrix, (0, 0, 0, missing)) if missing else matrix


def _topk(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n_queries, n_rows = similarities.shape
    if n_rows % GROUP or n_rows < ROWS_PER_NEIGHBOUR_TO_GROUP * k:
        values, columns = similarities.topk(k)
        return values, columns
    # The k largest are in the k groups of columns with the largest maxima. Column j * n_groups + i is in group i.
    groups = similarities.view(n_queries, GROUP, -1)
    n_groups = groups.shape[2]
    best = groups.amax(dim=1).topk(k, sorted=False).indices
    values, places = groups.gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1).topk(k)
    return values, (places // k) * n_groups + best.gather(1, places % k)


def _best_of_block(similarities: Tensor, ids: Tensor, k: int) -> Tensor:
    if similarities.shape[1] <= k:
        return pack(similarities, ids)
    values, columns = _topk(similarities, k + 1)
    keys = pack(values[:, :k], ids[columns[:, :k]])
    # Where the last one taken equals the first one left out, topk may have taken any of the equal ones.
    for rows in (values[:, k - 1] == values[:, k]).nonzero()[:, 0].split(ROW_MULTIPLE):
        keys[rows] = pack(similarities[rows], ids).topk(k).values
    return keys
