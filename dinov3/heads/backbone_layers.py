"""Which blocks of a backbone a dense head reads, and how wide they are.

Notable: of 24 blocks the even intervals start at block 4, not 5. Published heads were trained with that slip; list the
blocks to have even intervals.
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


#: A set, its name, or the indices of blocks.
BackboneLayers = BackboneLayersSet | str | Sequence[int]

PUBLISHED_EXCEPTIONS = {24: [4, 11, 17, 23]}


def backbone_out_indices(backbone: Any, layers: BackboneLayers) -> list[int]:
    """Return the indices, from 0 and in the given order, of the blocks that are read.

    Args:
        backbone: without `n_blocks` it counts as one block.
        layers: a set, its name, or indices.

    Raises:
        ValueError: an unknown name, fewer than four blocks for four, a repeated index, or one that the backbone lacks.
    """
    n_blocks = int(getattr(backbone, "n_blocks", 1))
    if isinstance(layers, str) and layers not in BackboneLayersSet.__members__:
        names = ", ".join(BackboneLayersSet.__members__)
        raise ValueError(f"backbone_out_layers={layers!r}: expected {names} or a list of blocks")
    if isinstance(layers, str | BackboneLayersSet):
        name = layers if isinstance(layers, str) else layers.name
        quarter = n_blocks // 4
        indices = {
            "LAST": [n_blocks - 1],
            "FOUR_LAST": list(range(n_blocks - 4, n_blocks)),
            "FOUR_EVEN_INTERVALS": PUBLISHED_EXCEPTIONS.get(n_blocks, [quarter * i - 1 for i in (1, 2, 3, 4)]),
        }[name]
    else:
        name, indices = str(layers), [int(index) for index in layers]
    if not indices or min(indices) < 0 or max(indices) >= n_blocks or len(set(indices)) < len(indices):
        raise ValueError(
            f"backbone_out_layers={name} of a backbone with {n_blocks} blocks: expected different indices from 0 to "
            f"{n_blocks - 1}, got {indices}"
        )
    return indices


def backbone_widths(backbone: Any, indices: Sequence[int]) -> list[int]:
    """Return the channels of the maps after these blocks: the backbone's `embed_dims`, or `embed_dim` for all."""
    widths = getattr(backbone, "embed_dims", None)
    return [int(backbone.embed_dim if widths is None else widths[index]) for index in indices]
