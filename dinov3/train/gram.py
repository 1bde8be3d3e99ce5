"""Gram anchoring (arXiv 2508.10104, section 4): which patches are compared, how much they weigh, when the teacher ages.

Notable: the calendar depends on the iteration alone, so a run that is resumed refreshes its Gram teacher exactly when
an uninterrupted one does. Its iterations are absolute, counted from the beginning of the first stage.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from dinov3.loss import GramLoss

logger = logging.getLogger("dinov3")


@dataclass(frozen=True)
class GramCalendar:
    """When the Gram teacher is replaced by the EMA teacher.

    Args:
        load_before: iteration before which it is, once; negative: never.
        repeats: whether it is replaced again and again, as the other arguments say.
        first: number of finished iterations from which on it is.
        frequency: only after multiples of this many finished iterations.
        maximum: how many times at most; None: without end.
    """

    load_before: int = -1
    repeats: bool = False
    first: int = 0
    frequency: int = 1
    maximum: int | None = None

    @classmethod
    def from_config(cls, cfg: Any) -> GramCalendar:
        """The calendar of the section `gram`; nothing ever happens without a Gram teacher of its own."""
        gram = cfg.gram
        if not gram.use_loss or gram.ema_teacher:
            return cls()
        return cls(
            gram.it_load_ema_teacher, gram.rep_update, gram.it_first_update, gram.update_frequency, gram.max_updates
        )

    def loads_before(self, iteration: int) -> bool:
        """Whether the EMA becomes the Gram teacher before `iteration` runs."""
        return iteration == self.load_before

    def refreshes_after(self, iteration: int) -> bool:
        """Whether the EMA becomes the Gram teacher once `iteration` has been run."""
        return self.repeats and self.n_refreshes(iteration + 1) > self.n_refreshes(iteration)

    def n_refreshes(self, n_iterations: int) -> int:
        """How many of the repeated replacements lie within the first `n_iterations` iterations."""
        before_first = (max(self.first, 1) - 1) // self.frequency
        count = max(n_iterations // self.frequency - before_first, 0)
        return count if self.maximum is None else min(count, self.maximum)


def warn_of_idle_gram(schedule: Any, n_iterations: int) -> None:
    """Warn of a run that begins anew although its Gram loss has no weight for most of it."""
    if schedule is None:
        return
    n_idle = int(np.argmax(np.asarray(schedule) != 0))
    if n_idle > n_iterations / 2:
        logger.warning(
            "this run starts at iteration 0, but its Gram loss has weight 0 until iteration %d: to continue an earlier "
            "stage, put that stage's directory ckpt into the output directory",
            n_idle,
        )


def make_gram_loss(cfg: Any) -> GramLoss:
    """The loss of the section `gram`."""
    gram = cfg.gram
    return GramLoss(
        apply_norm=gram.normalized,
        img_level=gram.img_level,
        remove_neg=gram.remove_neg,
        remove_only_teacher_neg=gram.remove_only_teacher_neg,
    )


def resize_patches(patches: Tensor, n_patches: int, *, mode: str, antialias: bool) -> Tensor:
    """Patch tokens of a square grid, interpolated to another square grid.

    Args:
        patches: [B, P, D].
        n_patches: of the other grid.
        mode: `bicubic` or `bilinear`.
        antialias: smooth before shrinking.

    Returns:
        [B, n_patches, D]; `patches` itself if it has as many.

    Raises:
        ValueError: a grid is not square.
    """
    if patches.shape[1] == n_patches:
        return patches
    before, after = _side(patches.shape[1]), _side(n_patches)
    grid = patches.mT.unflatten(-1, (before, before))  # [B, D, H, W]
    grid = F.interpolate(grid, size=(after, after), mode=mode, align_corners=False, antialias=antialias)
    return grid.flatten(2).mT


def select_patches(patches: Tensor, masks: Tensor, tokens_used: str) -> Tensor:
    """The patches that the Gram loss sees.

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


def _side(n_patches: int) -> int:
    side = math.isqrt(n_patches)
    if side * side != n_patches:
        raise ValueError(f"the Gram loss needs square crops, but one has {n_patches} patches, which is no square")
    return side
