"""Random block masks for iBOT (arXiv 2111.07832), as in BEiT (2106.08254, algorithm 1).

Rectangles of random area and aspect ratio are placed until the wanted number of patches is nearly masked; single random
patches complete it exactly. Blocks are drawn from Python's global `random`, the completion from NumPy's global legacy
generator, so seeding these two reproduces the masks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dinov3.utils.integers import as_pair

_ATTEMPTS_PER_BLOCK = 10


class MaskingGenerator:
    """Draws block masks on a grid of patches.

    Args:
        input_size: height and width of the grid in patches, or one number for both.
        num_masking_patches: only the default of `max_num_patches`.
        min_num_patches: smallest area of a block, in patches, before rounding.
        max_num_patches: most patches that one block may add. Default: no limit.
        min_aspect: smallest ratio of a block's height to its width.
        max_aspect: largest ratio. Default: 1 / `min_aspect`.
    """

    def __init__(
        self,
        input_size: int | Sequence[int],
        num_masking_patches: int | None = None,
        min_num_patches: int = 4,
        max_num_patches: float | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ) -> None:
        self.height, self.width = as_pair(input_size)
        self.num_patches = self.height * self.width
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        self.max_num_patches = num_masking_patches if max_num_patches is None else max_num_patches
        self.log_aspect_ratio = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))

    def __repr__(self) -> str:
        low, high = (math.exp(ratio) for ratio in self.log_aspect_ratio)
        return (
            f"MaskingGenerator({self.height} x {self.width} patches, blocks of {self.min_num_patches} to "
            f"{self.max_num_patches or self.num_patches}, aspect ratio {low:.3f} to {high:.3f})"
        )

    def get_shape(self) -> tuple[int, int]:
        """Return height and width of the grid."""
        return self.height, self.width

    def __call__(self, num_masking_patches: int = 0) -> NDArray[np.bool_]:
        """Draw a mask.

        Args:
            num_masking_patches: number of patches to mask, at most all of the grid.

        Returns:
            bool [height, width] with exactly that many true entries.

        Raises:
            ValueError: more patches than the grid has.
        """
        if not 0 <= num_masking_patches <= self.num_patches:
            raise ValueError(
                f"{num_masking_patches} patches to mask, expected 0 to {self.num_patches} "
                f"(the grid is {self.height} x {self.width})"
            )
        mask = np.zeros((self.height, self.width), dtype=bool)
        missing = num_masking_patches
        while missing > 0:
            added = self._add_block(mask, missing)
            if not added:
                break
            missing -= added
        # Drawn even if nothing is missing: the draw advances the generator, and seeded masks stay as published.
        mask.flat[np.random.choice(np.flatnonzero(~mask), size=missing, replace=False)] = True
        return mask

    def _add_block(self, mask: NDArray[np.bool_], missing: int) -> int:
        most = missing if self.max_num_patches is None else min(missing, self.max_num_patches)
        for _ in range(_ATTEMPTS_PER_BLOCK):
            area = random.uniform(self.min_num_patches, most)
            aspect = math.exp(random.uniform(*self.log_aspect_ratio))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.height or width >= self.width:  # a block never spans the grid, as published
                continue
            top = random.randint(0, self.height - height)
            left = random.randint(0, self.width - width)
            block = mask[top : top + height, left : left + width]
            added = block.size - int(np.count_nonzero(block))
            if 0 < added <= most:
                block[:] = True
                return added
        return 0
