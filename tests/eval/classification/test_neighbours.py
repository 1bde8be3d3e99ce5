"""The exact search: its tie rule, its independence of blocks, its votes and its memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.eval.classification import neighbours


def brute_force(queries: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and rows of the k best by a full, stable sort: equal similarities keep the order of the rows."""
    similarities, order = (queries @ features.T).sort(dim=1, descending=True, stable=True)
    return similarities[:, :k], order[:, :k]


def whole_numbers(rows: int, dim: int, seed: int) -> Tensor:
    """Features whose dot products are exact and often equal."""
    return torch.randint(-2, 3, (rows, dim), generator=torch.Generator().manual_seed(seed)).float()


def test_keys_sort_by_similarity_then_lower_id() -> None:
    similarities = torch.tensor([[0.5, -1.5, 0.5, -0.0, 0.0, float("inf"), -2.0, 1e-30]])
    keys = neighbours.pack(similarities, torch.arange(8))
    order = keys.argsort(descending=True)[0].tolist()
    assert order == [5, 0, 2, 7, 3, 4, 1, 6]


def test_keys_give_back_what_they_were_made_of() -> None:
    similarities = torch.randn(5, 100)
    ids = torch.randint(0, 2**32, (5, 100))
    again, ids_again = neighbours.unpack(neighbours.pack(similarities, ids))
    assert torch.equal(again, similarities) and torch.equal(ids_again, ids)


@pytest.mark.parametrize("rows_per_block", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 5, 40, 149, 150, 200])
def test_equal_similarities_go_to_the_lower_row(k: int, rows_per_block: int) -> None:
    features, queries, ids = whole_numbers(150, 3, seed=0), whole_numbers(30, 3, seed=1), torch.arange(150) * 3
    keys = neighbours.search(queries, features, ids, k, rows_per_block=rows_per_block)
    similarities, found = neighbours.unpack(keys)
    want_similarities, want_rows = brute_force(queries, features, k)
    assert torch.equal(similarities, want_similarities) and torch.equal(found, ids[want_rows])


def test_identical_features_are_neighbours_in_their_order() -> None:
    keys = neighbours.search(torch.ones(3, 2), torch.ones(500, 2), torch.arange(500), 20, rows_per_block=90)
    assert (neighbours.unpack(keys)[1] == torch.arange(20)).all()


@pytest.mark.parametrize("n_queries, n_rows", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_search_finds_nothing(n_queries: int, n_rows: int) -> None:
    found = neighbours.search(torch.zeros(n_queries, 3), torch.zeros(n_rows, 3), torch.arange(n_rows), 5)
    assert found.shape == (n_queries, n_rows)


@pytest.mark.parametrize("dim", [1, 5, 48, 384])
def test_similarities_do_not_depend_on_blocks_to_the_last_bit(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    features, queries = torch.randn(331, dim, generator=generator), torch.randn(37, dim, generator=generator)
    # Copies of one row at positions that a matrix product treats differently.
    features[[0, 63, 130, 330]] = features[17].clone()
    ids = torch.arange(331)
    want = neighbours.search(queries, features, ids, 331)
    buffer = neighbours.make_buffer(37, 331, torch.float32, queries.device)  # shared by all, whatever is left in it
    for rows, columns in ((1, 64), (10, 100), (37, 3), (10, 331)):
        found = [
            neighbours.search(block, features, ids, 331, rows_per_block=columns, buffer=buffer)
            for block in queries.split(rows)
        ]
        assert torch.equal(torch.cat(found), want), f"blocks of {rows} x {columns}"


def test_votes_are_one_softmax_over_all_neighbours_cut_at_k() -> None:
    similarities = torch.tensor([[0.9, 0.7, 0.4, 0.1]])
    keys = neighbours.pack(similarities, torch.tensor([3, 0, 2, 1]))
    labels = torch.tensor([1, 0, 1, 2])  # of the neighbours, best first: 2, 1, 1, 0
    weights = (similarities[0] / 0.5).softmax(0)
    lists = neighbours.make_class_lists(labels, 3)
    scores = neighbours.vote(keys, lists, ks=[3, 1], temperature=0.5, num_classes=3)
    assert list(scores) == [1, 3]
    torch.testing.assert_close(scores[1], torch.stack([torch.zeros(2)[0], torch.zeros(2)[0], weights[0]])[None])
    torch.testing.assert_close(scores[3], torch.stack([torch.zeros(2)[0], weights[1] + weights[2], weights[0]])[None])


def test_class_lists_of_multi_hot_labels() -> None:
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    assert neighbours.make_class_lists(labels, 3).tolist() == [[0, 2], [3, 3], [1, 3]]
    assert neighbours.make_class_lists(torch.tensor([2, 0]), 3).tolist() == [[2], [0]]


def test_blocks_shrink_with_the_budget_and_with_the_number_of_classes() -> None:
    def sizes(megabytes: int, n_classes: int) -> tuple[int, int]:
        scores = 4 * n_classes * 5
        arguments: dict[str, Any] = {"dim": 384, "n_neighbours": 200, "n_votes": 200, "score_bytes": scores}
        return neighbours.block_sizes(megabytes * 2**20, **arguments)

    assert sizes(512, 1000) == (1024, 32768)
    assert sizes(512, 21841)[0] < 1024
    for megabytes, n_classes in itertools.product((8, 32, 128), (10, 1000, 21841)):
        queries, rows = sizes(megabytes, n_classes)
        assert queries % 64 == rows % 64 == 0
        assert queries == 64 or queries * (20 * n_classes) <= megabytes * 2**20
        assert rows == 64 or 8 * queries * rows <= megabytes * 2**20


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_best_of_many_rows_are_found_among_the_best_groups(
    k: int, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "VALUES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    n_rows = neighbours.ROWS_PER_NEIGHBOUR_TO_GROUP * 16 + 1
    features, queries = whole_numbers(n_rows, 8, seed=2), whole_numbers(64, 8, seed=3)
    similarities, ids = neighbours.unpack(neighbours.search(queries, features, torch.arange(n_rows), k))
    want_similarities, want_ids = brute_force(queries, features, k)
    assert torch.equal(similarities, want_similarities) and torch.equal(ids, want_ids)


@pytest.mark.parametrize("k", [1, 15, 200])
@pytest.mark.parametrize("n_shards", [2, 3, 7])
def test_shards_find_together_what_one_search_finds(n_shards: int, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    features, queries = torch.randn(450, 48, generator=generator), torch.randn(30, 48, generator=generator)
    features[100:300] = features[100].clone()  # equal ones at the end of most lists of neighbours
    ids = torch.arange(450)
    want = neighbours.search(queries, features, ids, k)
    parts = [slice(shard, None, n_shards) for shard in range(n_shards)]
    found = [neighbours.search(queries, features[part], ids[part], k, rows_per_block=64) for part in parts]
    assert torch.equal(torch.cat(found, dim=1).topk(k).values, want)
