"""Which blocks of a backbone a dense head reads, and how wide they are.

Notable: of 24 blocks the even intervals begin at block 4, not 5. Published heads were trained with that slip; who wants
even ones lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any


class BackboneLayersSet(Enum):
    """Blocks of a backbone by name."""

    LAST = "LAST"
    FOUR_LAST = "FOUR_LAST"
    FOUR_EVEN_INTERVALS = "FOUR_EVEN_INTERVALS"


#: What is accepted: a set, its name, or the indices of blocks.
BackboneLayers = BackboneLayersSet | str | Sequence[int]

PUBLISHED_EXCEPTIONS = {24: [4, 11, 17, 23]}


def backbone_out_indices(backbone: Any, layers: BackboneLayers) -> list[int]:
    """The indices, from 0 and as given, of the blocks that are read.

    Args:
        backbone: with `n_blocks`; 1 if it has none.
        layers: a set, its name, or indices.

    Raises:
        ValueError: an unknown name, fewer than four blocks for four, an index twice, or one that the backbone lacks.
    """
    n_blocks = int(getattr(backbone, "n_blocks", 1))
    if isinstance(layers, str | BackboneLayersSet):
        indices = _indices_of_set(_as_set(layers), n_blocks)
    else:
        indices = [int(index) for index in layers]
    if not indices or min(indices) < 0 or max(indices) >= n_blocks or len(set(indices)) < len(indices):
        raise ValueError(
            f"backbone_out_layers={_name(layers)} of a backbone of {n_blocks} blocks: expected different indices from "
            f"0 to {n_blocks - 1}, got {indices}"
        )
    return indices


def backbone_widths(backbone: Any, indices: Sequence[int]) -> list[int]:
    """Channels of the maps after these blocks: `embed_dims` of the backbone, or `embed_dim` for all."""
    widths = getattr(backbone, "embed_dims", None)
    return [int(backbone.embed_dim if widths is None else widths[index]) for index in indices]


def _as_set(layers: str | BackboneLayersSet) -> BackboneLayersSet:
    if isinstance(layers, BackboneLayersSet):
        return layers
    if layers not in BackboneLayersSet.__members__:
        raise ValueError(
            f"backbone_out_layers={layers!r}: expected {', '.join(BackboneLayersSet.__members__)} or a list of blocks"
        )
    return BackboneLayersSet[layers]


def _indices_of_set(layers: BackboneLayersSet, n_blocks: int) -> list[int]:
    if layers is BackboneLayersSet.LAST:
        return [n_blocks - 1]
    if layers is BackboneLayersSet.FOUR_LAST:
        return list(range(n_blocks - 4, n_blocks))
    quarter = n_blocks // 4
    return PUBLISHED_EXCEPTIONS.get(n_blocks, [quarter * i - 1 for i in (1, 2, 3, 4)])


def _name(layers: BackboneLayers) -> str:
    return layers.name if isinstance(layers, BackboneLayersSet) else str(layers)
