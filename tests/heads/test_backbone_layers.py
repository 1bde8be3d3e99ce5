"""Which blocks a head reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dinov3.heads.backbone_layers import BackboneLayersSet, backbone_out_indices, backbone_widths


def blocks(n_blocks: int) -> Any:
    return SimpleNamespace(n_blocks=n_blocks, embed_dim=8)


def test_sets_by_member_and_by_name() -> None:
    assert backbone_out_indices(blocks(12), BackboneLayersSet.LAST) == [11]
    assert backbone_out_indices(blocks(12), "FOUR_LAST") == [8, 9, 10, 11]
    assert backbone_out_indices(blocks(27), "FOUR_EVEN_INTERVALS") == [5, 11, 17, 23]


def test_even_intervals_of_24_blocks_are_those_of_published_heads() -> None:
    assert backbone_out_indices(blocks(24), BackboneLayersSet.FOUR_EVEN_INTERVALS) == [4, 11, 17, 23]


def test_indices_are_used_as_they_are() -> None:
    assert backbone_out_indices(blocks(24), (5, 11, 17, 23)) == [5, 11, 17, 23]
    assert backbone_out_indices(blocks(4), [3, 0]) == [3, 0]


def test_backbone_that_does_not_say_has_one_block() -> None:
    assert backbone_out_indices(SimpleNamespace(embed_dim=8), "LAST") == [0]


def test_widths_are_those_of_the_blocks_or_of_the_backbone() -> None:
    assert backbone_widths(blocks(12), [2, 5]) == [8, 8]
    assert backbone_widths(SimpleNamespace(embed_dim=4, embed_dims=[1, 2, 3, 4]), [0, 2]) == [1, 3]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([3, 12], r"backbone_out_layers=\[3, 12\] of a backbone with 12 blocks: .* from 0 to 11, got \[3, 12\]"),
        ([-1], "got"),
        ([3, 3], "different indices"),
        ([], "got"),
        ("EVEN", "backbone_out_layers='EVEN': expected LAST, FOUR_LAST, FOUR_EVEN_INTERVALS or a list of blocks"),
    ],
)
def test_missing_blocks(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbone_out_indices(blocks(12), layers)


@pytest.mark.parametrize("layers", ["FOUR_LAST", "FOUR_EVEN_INTERVALS"])
def test_four_of_fewer_blocks(layers: str) -> None:
    with pytest.raises(ValueError, match=f"backbone_out_layers={layers} of a backbone with 3 blocks"):
        backbone_out_indices(blocks(3), BackboneLayersSet[layers])
