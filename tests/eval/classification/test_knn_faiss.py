"""k-NN by faiss gives what k-NN by torch gives, by the same tie rule; and both give what scikit-learn gives."""

from __future__ import annotations

import math
import sys

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from dinov3.eval.classification import neighbours, neighbours_faiss
from dinov3.eval.classification.knn_config import TrainConfig
from dinov3.eval.classification.knn_module import KnnModule
from dinov3.eval.classification.neighbours_faiss import choose_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KS = [1, 10, 20, 200]


def make_module(backend: str, features: Tensor, labels: Tensor, T: float = 0.07) -> KnnModule:
    num_classes = int(labels.max()) + 1
    return KnnModule(
        train_features=features,
        train_labels=labels,
        device="cpu",
        ks=KS,
        T=T,
        num_classes=num_classes,
        memory_budget_mb=2,
        backend=backend,
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centred and normalised features and labels of 1000 training and 797 test images of handwritten digits."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    features = F.normalize((images - images.mean(dim=0)).float(), dim=1)
    return features[:1000], labels[:1000], features[1000:], labels[1000:]


@pytest.mark.parametrize("k", [1, 5, 40, 149, 150, 200])
def test_equal_similarities_go_to_the_lower_row(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Whole numbers: products are exact in either package, and often equal.
    features, queries = (torch.randint(-2, 3, (n, 3), generator=generator).float() for n in (150, 70))
    ids = torch.arange(150) * 3
    found = neighbours_faiss.search(queries, features, ids, k)
    assert torch.equal(found, neighbours.search(queries, features, ids, k))


@pytest.mark.parametrize("dim", [1, 48, 384])
def test_similarities_do_not_depend_on_blocks_to_the_last_bit(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    features, queries = torch.randn(1331, dim, generator=generator), torch.randn(37, dim, generator=generator)
    features[[0, 63, 1024, 1330]] = features[17].clone()
    ids = torch.arange(1331)
    want = neighbours_faiss.search(queries, features, ids, 1331)
    order = neighbours.unpack(want)[1]
    copies = torch.isin(order, torch.tensor([0, 17, 63, 1024, 1330]))
    assert (order[copies].view(37, 5) == torch.tensor([0, 17, 63, 1024, 1330])).all()
    for rows in (1, 10):
        found = [neighbours_faiss.search(block, features, ids, 1331) for block in queries.split(rows)]
        assert torch.equal(torch.cat(found), want)


@pytest.mark.parametrize("n_queries, n_rows", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_search_finds_nothing(n_queries: int, n_rows: int) -> None:
    found = neighbours_faiss.search(torch.zeros(n_queries, 3), torch.zeros(n_rows, 3), torch.arange(n_rows), 5)
    assert found.shape == (n_queries, n_rows)


def test_faiss_predicts_what_torch_predicts() -> None:
    features, labels, queries, _ = digits()
    ours, theirs = (make_module(name, features, labels)(queries) for name in ("torch", "faiss"))
    for k in KS:
        torch.testing.assert_close(ours[k], theirs[k], rtol=0, atol=1e-5)
        assert torch.equal(ours[k].argmax(dim=1), theirs[k].argmax(dim=1))


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("k", [1, 10, 20, 200])
def test_predictions_by_temperature_weights_are_those_of_scikit_learn(k: int, backend: str) -> None:
    features, labels, queries, _ = digits()

    def weigh(distances: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp((1 - distances) / 0.07)

    classifier = KNeighborsClassifier(k, weights=weigh, metric="cosine", algorithm="brute")
    want = classifier.fit(features.double().numpy(), labels.numpy()).predict_proba(queries.double().numpy())
    scores = make_module(backend, features, labels)(queries)[k]
    # Ours are divided by the weights of all 200 neighbours, scikit-learn's by those of k.
    np.testing.assert_allclose((scores / scores.sum(dim=1, keepdim=True)).numpy(), want, rtol=0, atol=1e-4)
    assert (scores.argmax(dim=1).numpy() == want.argmax(axis=1)).all()


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("k", [1, 10, 20, 200])
def test_uniform_votes_are_those_of_scikit_learn(k: int, backend: str) -> None:
    features, labels, queries, _ = digits()
    classifier = KNeighborsClassifier(k, weights="uniform", metric="cosine", algorithm="brute")
    want = classifier.fit(features.double().numpy(), labels.numpy()).predict_proba(queries.double().numpy())
    scores = make_module(backend, features, labels, T=math.inf)(queries)[k]
    counts = (scores * 200).round().double()
    np.testing.assert_allclose((counts / k).numpy(), want, rtol=0, atol=1e-9)
    assert (counts.argmax(dim=1).numpy() == want.argmax(axis=1)).all()


def test_auto_is_faiss_only_where_it_is_installed_and_can_search(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", CPU, torch.float32) == "faiss"
    assert choose_backend("auto", CPU, torch.bfloat16) == choose_backend("auto", CUDA, torch.float32) == "torch"
    assert choose_backend("torch", CPU, torch.float32) == "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_backend("auto", CPU, torch.float32) == "torch"


def test_faiss_that_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu, or choose train.backend=torch"):
        make_module("faiss", torch.eye(3), torch.arange(3))


def test_faiss_is_refused_where_it_cannot_search() -> None:
    with pytest.raises(ValueError, match="on cuda in float32: choose train.backend=torch"):
        choose_backend("faiss", CUDA, torch.float32)
    with pytest.raises(ValueError, match="on cpu in bfloat16: choose"):
        choose_backend("faiss", CPU, torch.bfloat16)
    with pytest.raises(ValueError, match="train.backend=annoy: expected auto, torch, faiss"):
        TrainConfig(dataset="", backend="annoy")


def test_threads_are_those_of_torch() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            neighbours_faiss.search(torch.eye(3), torch.eye(3), torch.arange(3), 1)
            assert faiss.omp_get_max_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("k", [1, 15, 200])
@pytest.mark.parametrize("n_shards", [2, 3, 7])
def test_shards_find_together_what_one_search_finds(n_shards: int, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    features, queries = torch.randn(450, 48, generator=generator), torch.randn(30, 48, generator=generator)
    features[100:300] = features[100].clone()  # equal ones at the end of most lists of neighbours
    ids = torch.arange(450)
    want = neighbours_faiss.search(queries, features, ids, k)
    parts = [slice(shard, None, n_shards) for shard in range(n_shards)]
    found = [neighbours_faiss.search(queries, features[part], ids[part], k, rows_per_block=64) for part in parts]
    assert torch.equal(torch.cat(found, dim=1).topk(k).values, want)
