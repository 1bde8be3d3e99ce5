"""Gram anchoring (arXiv 2508.10104, section 4): which patches are compared, and when the Gram teacher is replaced."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("dinov3")


@dataclass(frozen=True)
class GramCalendar:
    """When the EMA teacher is copied into the Gram teacher: once before an iteration, and in refreshes.

    Iterations are absolute, counted from the beginning of the first stage. Nothing else decides, so that a run that is
    resumed refreshes its Gram teacher exactly when an uninterrupted one does.

    Args:
        load_before: the iteration of the single copy; negative: never.
        repeats: whether there are refreshes, which the other arguments describe.
        first: no refresh before this many finished iterations.
        frequency: refreshes come after multiples of this many finished iterations.
        maximum: how many refreshes at most. Default: no limit.
    """

    load_before: int = -1
    repeats: bool = False
    first: int = 0
    frequency: int = 1
    maximum: int | None = None

    @classmethod
    def from_config(cls, cfg: Any) -> GramCalendar:
        """Make the calendar of the section `gram`; it is empty where the EMA itself is the Gram teacher."""
        gram = cfg.gram
        if not gram.use_loss or gram.ema_teacher:
            return cls()
        return cls(
            gram.it_load_ema_teacher, gram.rep_update, gram.it_first_update, gram.update_frequency, gram.max_updates
        )

    def loads_before(self, iteration: int) -> bool:
        """Return whether the EMA is copied before `iteration` runs."""
        return iteration == self.load_before

    def refreshes_after(self, iteration: int) -> bool:
        """Return whether the EMA is copied once `iteration` has been run."""
        return self.repeats and self.n_refreshes(iteration + 1) > self.n_refreshes(iteration)

    def n_refreshes(self, n_iterations: int) -> int:
        """Return how many refreshes lie within the first `n_iterations` iterations."""
        before_first = (max(self.first, 1) - 1) // self.frequency
        count = max(n_iterations // self.frequency - before_first, 0)
        return count if self.maximum is None else min(count, self.maximum)


def warn_of_idle_gram(weights: Any, n_iterations: int) -> None:
    """Warn of a run that starts from iteration 0 although its Gram loss has weight 0 for most of it.

    Args:
        weights: the weight of each iteration; the last one holds for all that follow.
        n_iterations: length of the run.
    """
    n_idle = int(np.argmax(np.asarray(weights) != 0))
    if n_idle > n_iterations / 2:
        logger.warning(
            "this run starts at iteration 0, but its Gram loss has weight 0 until iteration %d: to continue an earlier "
            "stage, put that stage's directory ckpt into the output directory",
            n_idle,
        )


def resize_patches(patches: Tensor, n_patches: int, *, mode: str, antialias: bool) -> Tensor:
    """Interpolate patch tokens of a square grid to another square grid.

    Args:
        patches: [B, P, D].
        n_patches: number of patches of the other grid.
        mode: `bicubic` or `bilinear`.
        antialias: smooth before shrinking.

    Returns:
        [B, n_patches, D]; `patches` itself if it has as many.

    Raises:
        ValueError: a grid is not square.
    """
    if patches.shape[1] == n_patches:
        return patches
    before, after = math.isqrt(patches.shape[1]), math.isqrt(n_patches)
    for n, side in ((patches.shape[1], before), (n_patches, after)):
        if n != side**2:
            raise ValueError(f"the Gram loss needs square crops, but {n} patches are not a square")
    grid = patches.mT.unflatten(-1, (before, before))  # [B, D, H, W]
    grid = F.interpolate(grid, size=(after, after), mode=mode, align_corners=False, antialias=antialias)
    return grid.flatten(2).mT


def select_patches(patches: Tensor, masks: Tensor, tokens_used: str) -> Tensor:
    """Return the patches that the Gram loss compares.

    Args:
        patches: [B, P, D].
        masks: bool [B, P].
        tokens_used: `all`, `masked` or `unmasked`.

    Returns:
        `patches`, or the chosen rows [n, D].
    """
    if tokens_used == "all":
        return patches
    return patches[masks if tokens_used == "masked" else ~masks]
