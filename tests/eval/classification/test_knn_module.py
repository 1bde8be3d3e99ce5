"""The k-NN classifier against its definition and scikit-learn, and within its memory budget."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from dinov3.eval.classification.knn_module import KnnModule, knn_accuracy

REPOSITORY = Path(__file__).parents[3]


def one_hot_scores(
    queries: Tensor, features: Tensor, labels: Tensor, *, ks: list[int], T: float, skip: bool
) -> dict[int, Tensor]:
    """The definition, with a table of all similarities and a one-hot vote; ties to the lower row."""
    similarities, order = (queries @ features.T).sort(dim=1, descending=True, stable=True)
    first, last = int(skip), max(ks) + int(skip)
    weights = (similarities[:, first:last] / T).softmax(dim=1)
    votes = labels[order[:, first:last]] if labels.ndim == 2 else F.one_hot(labels, 9)[order[:, first:last]]
    return {k: (votes[:, :k] * weights[:, :k, None]).sum(dim=1) for k in ks}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("multi_hot", [False, True])
@pytest.mark.parametrize("n_rows, n_queries", [(1, 1), (3, 70), (130, 1), (300, 200)])
def test_scores_are_those_of_the_definition(n_rows: int, n_queries: int, multi_hot: bool, skip: bool) -> None:
    generator = torch.Generator().manual_seed(n_rows)
    # Whole numbers, so that there are ties.
    features = torch.randint(-2, 3, (n_rows, 4), generator=generator).float()
    queries = torch.randint(-2, 3, (n_queries, 4), generator=generator).float()
    labels = torch.randint(0, 2, (n_rows, 9), generator=generator)
    if not multi_hot:
        labels = torch.randint(0, 9, (n_rows,), generator=generator)
    ks = sorted({min(k, n_rows) for k in (1, 4, 100)})
    module = KnnModule(
        train_features=features,
        train_labels=labels,
        device="cpu",
        ks=ks,
        T=3.0,
        num_classes=9,
        skip_first_nn=skip,
        memory_budget_mb=0.01,
    )
    assert module.queries_per_block == module.rows_per_block == 64
    scores = module(queries)
    want = one_hot_scores(queries, features, labels, ks=ks, T=3.0, skip=skip)
    assert list(scores) == ks
    for k in ks:
        torch.testing.assert_close(scores[k], want[k].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("T", [0.07, math.inf])
def test_votes_are_those_of_scikit_learn(T: float) -> None:
    """On images of digits; with an infinite temperature all neighbours have the same weight."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    features = F.normalize((images - images.mean(dim=0)).float(), dim=1)
    train, queries = features[:1000], features[1000:]
    ks = [1, 10, 20, 200]

    def weigh(distances: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp((1 - distances) / T)

    module = KnnModule(
        train_features=train, train_labels=labels[:1000], device="cpu", ks=ks, T=T, num_classes=10, memory_budget_mb=2
    )
    for k, scores in module(queries).items():
        classifier = KNeighborsClassifier(k, weights=weigh, metric="cosine", algorithm="brute")
        classifier.fit(train.double().numpy(), labels[:1000].numpy())
        want = classifier.predict_proba(queries.double().numpy())
        # Ours are divided by the weights of all 200 neighbours, scikit-learn's by those of k.
        shares = (scores / scores.sum(dim=1, keepdim=True)).numpy()
        np.testing.assert_allclose(shares, want, rtol=0, atol=1e-4)
        # Rounded, because equal votes of two classes differ in their last bits.
        assert (shares.round(5).argmax(axis=1) == want.round(5).argmax(axis=1)).all()


def test_no_queries_have_no_scores() -> None:
    module = KnnModule(
        train_features=torch.eye(3), train_labels=torch.arange(3), device="cpu", ks=[2], T=1.0, num_classes=3
    )
    assert module(torch.zeros(0, 3))[2].shape == (0, 3)


def test_search_is_in_float32_under_autocast_unless_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(500, 64, generator=generator), dim=1)
    queries = F.normalize(torch.randn(100, 64, generator=generator), dim=1)
    scores = {}
    for dtype in (torch.float32, torch.bfloat16):
        module = KnnModule(
            train_features=features,
            train_labels=torch.arange(500) % 10,
            device="cpu",
            ks=[20],
            T=0.07,
            num_classes=10,
            similarity_dtype=dtype,
        )
        scores[dtype] = module(queries)[20]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(module(queries)[20], scores[dtype])
    assert not torch.allclose(scores[torch.float32], scores[torch.bfloat16], atol=1e-3)


def test_precision_of_matrix_products_is_given_back() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        knn_accuracy(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), ks=(1,))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, 3]), "0 to 3, expected 0 to 2"),
        (torch.tensor([-1, 0]), "-1 to 0"),
        (torch.ones(2, 5, dtype=torch.int64), "5 columns"),
        (torch.tensor([0.0, 1.0]), "float32, expected integers"),
        (torch.zeros(0, dtype=torch.int64), "no training rows"),
    ],
)
def test_labels_out_of_range_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KnnModule(train_features=torch.eye(2), train_labels=labels, device="cpu", ks=[1], T=1.0, num_classes=3)


def test_knn_accuracy_normalises_and_counts_in_percent() -> None:
    train = torch.tensor([[100.0, 1.0], [0.0, 0.1], [-3.0, 0.0]])
    test = torch.tensor([[0.5, 0.0], [0.1, 9.0], [-1.0, 0.2], [1.0, 0.1]])
    accuracy = knn_accuracy(train, torch.tensor([0, 1, 2]), test, torch.tensor([0, 1, 2, 1]), ks=(1, 50))
    assert accuracy == {1: 75.0, 3: 75.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_counted_and_refused(value: float) -> None:
    # One NaN row was the nearest neighbour of every query.
    features, labels = torch.eye(20).repeat(10, 1), torch.arange(20).repeat(10)
    assert knn_accuracy(features, labels, features, labels, ks=(10,)) == {10: 100.0}
    broken = features.clone()
    broken[7, 3] = broken[9, 0] = value
    for train, test, name in ((broken, features, "train_features"), (features, broken, "test_features")):
        with pytest.raises(ValueError, match=rf"^2 of 200 rows of {name} .*the first is row 7$"):
            knn_accuracy(train, labels, test, labels)
    module = KnnModule(train_features=features, train_labels=labels, device="cpu", ks=[1], T=1.0, num_classes=20)
    with pytest.raises(ValueError, match="^1 of 3 rows of queries .*row 1$"):
        module(broken[6:9])
    with pytest.raises(ValueError, match="^2 of 200 rows of training features"):
        KnnModule(train_features=broken, train_labels=labels, device="cpu", ks=[1], T=1.0, num_classes=20)


def test_labels_of_knn_accuracy_are_one_integer_per_row() -> None:
    rows, labels = torch.eye(3), torch.arange(3)
    for train, test, name in (
        (labels.float(), labels, "train_labels are torch.float32"),
        (labels, labels.double(), "test_labels are torch.float64"),
        (labels, labels[:1], r"test_labels .* \(1,\); expected one integer for each of the 3 rows"),
        (labels[:2], labels, r"train_labels .* \(2,\)"),
    ):
        with pytest.raises(ValueError, match=name):
            knn_accuracy(rows, train, rows, test)


@pytest.mark.parametrize(("T", "ks"), [(0.0, [1]), (math.nan, [1]), (1.0, [0])])
def test_votes_without_a_temperature_or_a_neighbour_are_refused(T: float, ks: list[int]) -> None:
    with pytest.raises(ValueError, match="a temperature above 0 and neighbours from 1 on"):
        KnnModule(train_features=torch.eye(2), train_labels=torch.arange(2), device="cpu", ks=ks, T=T, num_classes=2)


MEASURE = """
import resource, sys, torch
from dinov3.eval.classification.knn_module import KnnModule

def search(n_rows, n_queries, n_classes):
    features = torch.randn(n_rows, 8) if sys.argv[1] == "random" else torch.ones(n_rows, 8)
    labels = torch.arange(n_rows) % n_classes
    module = KnnModule(train_features=features, train_labels=labels, device="cpu", ks=[200], T=0.07,
                       num_classes=n_classes, memory_budget_mb=32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    module(torch.randn(n_queries, 8))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

search(300, 10, 10)
print(search(50_000, 700, 3000))
"""


@pytest.mark.parametrize("features", ["random", "identical"])
def test_memory_stays_within_the_budget(features: str) -> None:
    command = [sys.executable, "-c", MEASURE, features]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    scores = 2 * 700 * 3000 * 4 / 2**20  # the parts, and the whole
    # The table of similarities alone would be 134 MiB, and one-hot votes of a batch of 256 as int64 1172 MiB.
    assert float(done.stdout) < 32 + scores + 16
