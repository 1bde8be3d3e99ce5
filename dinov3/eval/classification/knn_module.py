"""The k-NN classifier on given features.

Notable: queries are processed in blocks of a size that keeps temporaries within a memory budget, and processes that
have different training rows find each query's neighbours together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.eval.classification import neighbours


class KnnModule(nn.Module):
    """Score classes by the weighted vote of each query's nearest training rows. Nothing is normalised.

    Args:
        train_features: float32 [N, D]; with `row_ids`, only the rows [n, D] that this process searches.
        train_labels: integers: classes [N], or multi-hot [N, C].
        device: where features and labels go, and where the search runs.
        ks: numbers of neighbours that vote.
        T: temperature.
        num_classes: C.
        skip_first_nn: drop each query's best neighbour.
        row_ids: int64 [n], which of the N rows this process has. All processes must then call `forward` together.
        memory_budget_mb: for temporaries, not counting the scores returned.
        similarity_dtype: of the matrix product of queries and features.
        stream: leave the features where they are, on the CPU or in a mapped file, and bring blocks to the device.

    Raises:
        ValueError: a label is not in [0, C), or there are no training rows.
    """

    def __init__(
        self,
        *,
        train_features: Tensor,
        train_labels: Tensor,
        device: torch.device | str,
        ks: Sequence[int],
        T: float,
        num_classes: int = 1000,
        skip_first_nn: bool = False,
        row_ids: Tensor | None = None,
        memory_budget_mb: float = 512,
        similarity_dtype: torch.dtype = torch.float32,
        stream: bool = False,
    ) -> None:
        super().__init__()
        _check_labels(train_labels, num_classes)
        self.ks = sorted(set(ks))
        self.T = T
        self.num_classes = num_classes
        self.skip_first_nn = skip_first_nn
        self.sharded = row_ids is not None
        self.n_neighbours = min(self.ks[-1] + skip_first_nn, len(train_labels))
        # Attributes, not buffers: converting the module's dtype must not reach the features.
        self.features = train_features.float() if stream else train_features.to(device, torch.float32)
        self.device = torch.device(device)
        self.class_lists = neighbours.make_class_lists(train_labels.to(device), num_classes)
        self.row_ids = torch.arange(len(train_features), device=device) if row_ids is None else row_ids.to(device)
        n_processes = distributed.get_world_size() if self.sharded else 1
        self.queries_per_block, self.rows_per_block = neighbours.block_sizes(
            int(memory_budget_mb * 2**20),
            dim=train_features.shape[1],
            n_neighbours=self.n_neighbours,
            n_votes=self.n_neighbours * self.class_lists.shape[1],
            score_bytes=4 * num_classes * (1 + len(self.ks)),
            n_processes=n_processes,
        )
        n_rows = min(self.rows_per_block, len(self.features))
        search = functools.partial(
            neighbours.search,
            rows_per_block=self.rows_per_block,
            dtype=similarity_dtype,
            buffer=neighbours.make_buffer(n_processes * self.queries_per_block, n_rows, similarity_dtype, self.device),
        )
        self.search = functools.partial(neighbours.search_sharded, search_rows=search) if self.sharded else search

    @torch.no_grad()
    def forward(self, queries: Tensor) -> dict[int, Tensor]:
        """Return the class scores (float32 [M, C]) of queries [M, D] by k."""
        queries = queries.to(self.device, torch.float32)
        n_blocks = blocks_of_slowest_process(len(queries), self.queries_per_block) if self.sharded else None
        parts = [self._score(block) for block in split_rows(queries, self.queries_per_block, n_blocks)]
        return {k: torch.cat([part[k] for part in parts]) for k in self.ks}

    def _score(self, queries: Tensor) -> dict[int, Tensor]:
        with _full_precision(queries.device):
            keys = self.search(queries, self.features, self.row_ids, self.n_neighbours)
            return neighbours.vote(
                keys[:, 1:] if self.skip_first_nn else keys,
                self.class_lists,
                ks=self.ks,
                temperature=self.T,
                num_classes=self.num_classes,
            )


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, float]:
    """Return the top-1 accuracy in percent by k, with the cosine similarity of the given features.

    Args:
        train_features: [N, D], normalised here.
        train_labels: integers [N].
        test_features: [M, D], normalised here.
        test_labels: integers [M].
        ks: numbers of neighbours; more than N counts as N.
        temperature: of the softmax over similarities.
    """
    module = KnnModule(
        train_features=F.normalize(train_features.float(), dim=1),
        train_labels=train_labels,
        device=train_features.device,
        ks=[min(k, len(train_labels)) for k in ks],
        T=temperature,
        num_classes=int(train_labels.max()) + 1,
    )
    scores = module(F.normalize(test_features.float(), dim=1))
    targets = test_labels.to(train_features.device)
    return {k: 100 * (score.argmax(dim=1) == targets).double().mean().item() for k, score in scores.items()}


def blocks_of_slowest_process(n_rows: int, size: int) -> int:
    """Return the number of blocks of `size` rows of the process with the most rows; every process must call it."""
    return max(-(-n // size) for n in distributed.all_gather_objects(n_rows))


def split_rows(rows: Tensor, size: int, n_blocks: int | None = None) -> list[Tensor]:
    """Split into blocks of `size` rows, with empty ones at the end up to `n_blocks`; return at least one."""
    blocks = list(rows.split(size))
    return blocks + [rows[:0]] * ((n_blocks or 1) - len(blocks))


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if len(labels) == 0:
        raise ValueError("there are no training rows")
    if labels.ndim == 2 and labels.shape[1] != num_classes:
        raise ValueError(f"multi-hot training labels have {labels.shape[1]} columns, expected {num_classes}")
    if labels.ndim == 1 and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"training labels are {int(labels.min())} to {int(labels.max())}, expected 0 to {num_classes - 1}"
        )


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    # The search must not inherit the precision that the backbone runs in: neither autocast nor TensorFloat-32.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
