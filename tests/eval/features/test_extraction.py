"""Features of datasets without labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dinov3.eval.features.extraction import collate_enumerated, extract_features, extract_rows, make_enumerated_loader


class Unlabelled:
    """Sample i is the vector (i, -i), without a target."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, None]:
        return torch.tensor([index, -index], dtype=torch.float32), None


def test_padding_without_a_target_is_collated_with_its_index() -> None:
    image = torch.zeros(2)
    images, (index, targets) = collate_enumerated([(image, (3, 3)), (image, (-1, None))])
    assert images.shape == (2, 2) and index.tolist() == targets.tolist() == [3, -1]


def test_padding_with_a_target_keeps_it() -> None:
    _, (index, targets) = collate_enumerated([(torch.zeros(2), (3, 8)), (torch.zeros(2), (-1, 9))])
    assert index.tolist() == [3, -1] and targets.tolist() == [8, 9]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_share_of_each_process_of_an_unlabelled_dataset_can_be_loaded(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov3.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("dinov3.distributed.get_rank", lambda: rank)
    rows = extract_rows(nn.Identity(), make_enumerated_loader(Unlabelled(5), 2, 0))
    expected = list(range(rank, 5, 2))
    assert rows.positions.tolist() == rows.targets.tolist() == rows.features[:, 0].tolist() == expected


def test_targets_of_an_unlabelled_dataset_are_its_indices() -> None:
    features, targets = extract_features(nn.Identity(), Unlabelled(5), 2, 0)
    assert features.tolist() == [[index, -index] for index in range(5)] and targets.tolist() == list(range(5))
