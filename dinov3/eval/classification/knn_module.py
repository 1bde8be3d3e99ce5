"""The k-NN classifier on given features, and its scores for several training sets.

Notable: queries are processed in blocks of a size that keeps temporaries within a memory budget, and processes that
have different training rows find each query's neighbours together.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.eval.classification import neighbours
from dinov3.eval.classification.knn_config import TrainConfig
from dinov3.eval.classification.metrics import scalar_results
from dinov3.eval.classification.scoring import DictKeysModule, average_metrics, evaluate
from dinov3.eval.command.progress import track
from dinov3.eval.features.cache import FeatureRows
from dinov3.eval.features.extraction import check_finite_rows
from dinov3.utils import as_torch_dtype

logger = logging.getLogger("dinov3")


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
        ValueError: a label is not an integer in [0, C), there are no training rows, or one has NaN or infinity.
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
        n_rows = len(train_labels if row_ids is None else row_ids)
        if train_features.ndim != 2 or len(train_features) != n_rows:
            raise ValueError(
                f"training features are of shape {tuple(train_features.shape)}, expected {n_rows} rows, one for each "
                + ("label" if row_ids is None else "of row_ids")
            )
        if not (T > 0 and all(k >= 1 for k in ks)):
            raise ValueError(f"T={T}, ks={list(ks)}: expected a temperature above 0 and neighbours from 1 on")
        # Features that are streamed come from `extract_features`, which refuses such rows; reading them here is slow.
        if not stream:
            check_finite_rows(train_features, "training features")
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
        check_finite_rows(queries, "queries")
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


def score_features(
    test_rows: FeatureRows,
    train_data_dict: Mapping[int, Mapping[str, Tensor]],
    metric_collection: Any,
    config: TrainConfig,
    *,
    num_classes: int,
    device: torch.device,
    class_mapping: Tensor | None = None,
    stream: bool = False,
    save: Callable[[Mapping[str, Tensor], Mapping[str, Tensor] | None, str], None] | None = None,
    keep_scores: bool = False,
) -> dict[int, dict[str, float]]:
    """Classify features by the training features of each try.

    Args:
        test_rows: of this process.
        train_data_dict: by try, as returned by `data.extract_features_for_dataset_dict`.
        metric_collection: updated and computed in copies.
        config: `ks` and the settings of the vote.
        num_classes: number of training classes.
        device: where the search is done.
        class_mapping: int64, the training class of each scored class. Default: all training classes.
        stream: leave training features where they are, and bring them to the device block by block.
        save: called per try and k with the metric's fractions, the scores if they are kept, and a file name suffix.
        keep_scores: collect the scores and targets of all images, for `save`.

    Returns:
        Metrics in percent by k; with several tries their `<metric>_mean` and `<metric>_std`.
    """
    tries: dict[int, dict[int, dict[str, float]]] = {}
    for name, train_data in train_data_dict.items():
        module = _make_module(train_data, device, config, num_classes, stream)
        metrics = {k: metric_collection.clone() for k in module.ks}
        values, outputs = evaluate(
            model=module,
            data_loader=track(_query_blocks(test_rows, module.queries_per_block), "nearest neighbours"),
            postprocessors={k: DictKeysModule([k], class_mapping) for k in module.ks},
            metrics=metrics,
            device=device,
            accumulate_results=keep_scores,
        )
        tries[name] = {
            k: {metric: 100 * v for metric, v in scalar_results(metrics[k], value).items()}
            for k, value in values.items()
        }
        for k, output in outputs.items():
            if save is not None:
                save(values[k], output, f"k_{k}" if len(train_data_dict) == 1 else f"try_{name}_k_{k}")
    if len(tries) == 1:
        return next(iter(tries.values()))
    # A try with fewer images than k has no figure for k.
    ks = sorted({k for results in tries.values() for k in results})
    return {k: average_metrics({name: results[k] for name, results in tries.items() if k in results}) for k in ks}


def _make_module(
    train_data: Mapping[str, Tensor], device: torch.device, config: TrainConfig, num_classes: int, stream: bool
) -> KnnModule:
    n_train = len(train_data["train_labels"])
    ks = sorted({min(k, n_train) for k in config.ks})
    if ks[-1] < max(config.ks):
        logger.info("train.ks=%s: there are only %d training images, using %s", list(config.ks), n_train, ks)
    return KnnModule(
        train_features=train_data["train_features"],
        train_labels=train_data["train_labels"],
        row_ids=train_data.get("train_rows"),
        device=device,
        ks=ks,
        T=config.temperature,
        num_classes=num_classes,
        skip_first_nn=config.skip_first_nn,
        memory_budget_mb=config.memory_budget_mb,
        similarity_dtype=as_torch_dtype(config.similarity_dtype),
        stream=stream,
    )


def _query_blocks(rows: FeatureRows, size: int) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
    # As a loader yields them; as many in every process, because their search may contain collectives.
    n_blocks = blocks_of_slowest_process(len(rows.positions), size)
    parts = (split_rows(t, size, n_blocks) for t in (rows.features, rows.positions, rows.targets))
    return [(features, (index, targets)) for features, index, targets in zip(*parts, strict=True)]


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

    Raises:
        ValueError: a feature is NaN or infinite, or labels are not one integer from 0 on for each row.
    """
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if len(labels) == 0 or labels.shape != features.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"{name}_labels are {labels.dtype} of shape {tuple(labels.shape)}; expected one integer for each of "
                f"the {len(features)} rows of {name}_features"
            )
        # Before rows are normalised: infinity over infinity would be NaN, but 1 over infinity 0.
        check_finite_rows(features, f"{name}_features")
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
    if labels.is_floating_point():
        raise ValueError(f"training labels are {labels.dtype}, expected integers")
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
