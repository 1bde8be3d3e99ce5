"""The search of `neighbours` by faiss, an optional package: exact too, on the CPU.

Notable:
- `faiss.knn` is the search of a flat index without the index's copy of the features.
- faiss does not say which of equal similarities it takes. Where that matters at the last neighbour, all similarities
  of the query are sorted here, so the rule of `neighbours` holds: lower rows first.
- Similarities differ from torch's in their last bit, so rows closer than about 1e-7 may change places with each other.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.classification import neighbours

BACKENDS = ("auto", "torch", "faiss")


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The package that searches: of `auto`, faiss where it can, because it is faster with many rows, else torch.

    Args:
        backend: `auto`, `torch` or `faiss`.
        device: where the features are.
        dtype: of the matrix product.

    Returns:
        `torch` or `faiss`.

    Raises:
        ImportError: faiss is asked for, but not installed.
        ValueError: there is no such backend, or faiss cannot search on this device or in this dtype.
    """
    if backend not in BACKENDS:
        raise ValueError(f"train.backend={backend}: expected {', '.join(BACKENDS)}")
    can_search = device.type == "cpu" and dtype == torch.float32
    if backend == "faiss" and not can_search:
        raise ValueError(
            f"train.backend=faiss searches on the CPU in float32, not on {device.type} in {str(dtype)[6:]}: "
            "choose train.backend=torch"
        )
    if backend == "auto":
        return "faiss" if can_search and importlib.util.find_spec("faiss") is not None else "torch"
    if backend == "faiss":
        _import_faiss()
    return backend


def search(
    queries: Tensor,
    features: Tensor,
    ids: Tensor,
    k: int,
    *,
    rows_per_block: int = neighbours.MAX_ROWS_PER_BLOCK,
) -> Tensor:
    """`neighbours.search`, by faiss.

    Args:
        queries: float32 [M, D], on the CPU.
        features: float32 [N, D], on the CPU.
        ids: int64 [N], what the rows are called in the result; in [0, 2^32).
        k: number of neighbours.
        rows_per_block: training rows at a time where similarities are equal at the last neighbour.

    Returns:
        Keys (see `neighbours.pack`) [M, min(k, N)], best first.

    Raises:
        ImportError: faiss is not installed.
    """
    if len(queries) == 0 or len(features) == 0:
        return queries.new_empty(len(queries), min(k, len(features)), dtype=torch.int64)
    # Whole blocks, as in `neighbours`, or the last bits would depend on how many rows and queries there are.
    padded = neighbours.pad_rows(queries)
    whole = len(features) // neighbours.ROW_MULTIPLE * neighbours.ROW_MULTIPLE
    parts = ((features[:whole], ids[:whole]), (features[whole:], ids[whole:]))
    found = torch.cat([_best_of_part(padded, *part, k, rows_per_block) for part in parts], dim=1)[: len(queries)]
    return found.topk(min(k, found.shape[1])).values


def _best_of_part(queries: Tensor, features: Tensor, ids: Tensor, k: int, rows_per_block: int) -> Tensor:
    if len(features) <= max(k, neighbours.ROW_MULTIPLE):
        return _all_keys(queries, features, ids)
    similarities, rows = _nearest(queries, features, k + 1)
    keys = neighbours.pack(similarities[:, :k], ids[rows[:, :k]])
    # Where the last one taken equals the first one left out, faiss may have taken any of the equal ones.
    for tied in (similarities[:, k - 1] == similarities[:, k]).nonzero()[:, 0].split(neighbours.ROW_MULTIPLE):
        keys[tied] = _best_of_all_keys(queries[tied], features, ids, k, rows_per_block)
    return keys


def _best_of_all_keys(queries: Tensor, features: Tensor, ids: Tensor, k: int, rows_per_block: int) -> Tensor:
    padded = neighbours.pad_rows(queries)
    best = padded.new_empty(len(padded), 0, dtype=torch.int64)
    for block, block_ids in zip(features.split(rows_per_block), ids.split(rows_per_block), strict=True):
        best = torch.cat([best, _all_keys(padded, block, block_ids)], dim=1)
        best = best.topk(min(k, best.shape[1])).values
    return best[: len(queries)]


def _all_keys(queries: Tensor, features: Tensor, ids: Tensor) -> Tensor:
    if len(features) == 0:
        return queries.new_empty(len(queries), 0, dtype=torch.int64)
    padded = neighbours.pad_rows(features)
    similarities, rows = _nearest(queries, padded, len(padded))
    keys = neighbours.pack(similarities, F.pad(ids, (0, len(padded) - len(ids)))[rows])
    keys[rows >= len(ids)] = neighbours.WORST_KEY
    return keys.topk(len(ids)).values


def _nearest(queries: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    faiss = _import_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    similarities, rows = faiss.knn(queries.numpy(), features.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(similarities), torch.from_numpy(rows)


def _import_faiss() -> Any:
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # which processor features it tries is nobody's concern
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "train.backend=faiss needs faiss: pip install faiss-cpu, or choose train.backend=torch"
        ) from error
    return faiss
