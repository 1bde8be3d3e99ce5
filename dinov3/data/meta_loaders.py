"""One loader made of several, e.g. one per crop resolution."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from dinov3 import distributed

logger = logging.getLogger("dinov3")

# Ratios that are meant to add up to 1 may miss it by this much, for they are floats.
_RATIO_TOLERANCE = 1e-8


class CombinedDataLoader:
    """Draws a loader for each batch and yields that loader's next batch, until the drawn loader has none left.

    Each `iter()` starts the same sequence of draws again.

    Args:
        loaders_with_ratios: pairs (loader, probability of drawing it); every loader has an attribute `batch_size`.
        batch_size: of all loaders.
        combining_mode: `GLOBAL_HOMOGENEOUS`, every process draws the same loader, as it must if the loaders' batches
            differ in shape; or `LOCAL_HOMOGENEOUS`, each process draws for itself.
        seed: of the draws; mixed with the rank in the local mode.
        name: of the loader in the log.
        logging_period: number of batches after which the shares of the loaders are logged.
        advance: number of draws to leave out when resuming; the loaders must already stand where these draws have
            brought them, see `count_draws`.

    Attributes:
        loaders, batch_size, combining_mode, name: as given.
        ratios: list of the probabilities, which add up to 1.
        loader_count: float64 [number of loaders], number of batches that the newest iterator drew from each loader.

    Raises:
        ValueError: no loader, a ratio that is not positive, an unknown mode, or loaders of another batch size.
    """

    GLOBAL_HOMOGENEOUS = 0
    LOCAL_HOMOGENEOUS = 1

    def __init__(
        self,
        loaders_with_ratios: Iterable[tuple[Any, float]],
        batch_size: int,
        combining_mode: int = LOCAL_HOMOGENEOUS,
        seed: int = 65537,
        name: str | None = None,
        logging_period: int = 100,
        *,
        advance: int = 0,
    ) -> None:
        pairs = list(loaders_with_ratios)
        self.loaders = [loader for loader, _ in pairs]
        self.ratios = _normalize([float(ratio) for _, ratio in pairs], name)
        self.batch_size = batch_size
        self.combining_mode = combining_mode
        self.name = name
        self.loader_count = np.zeros(len(self.loaders))
        self._seed = seed
        self._logging_period = logging_period
        self._advance = advance
        if combining_mode not in (self.GLOBAL_HOMOGENEOUS, self.LOCAL_HOMOGENEOUS):
            raise ValueError(
                f"combining_mode={combining_mode!r} is neither GLOBAL_HOMOGENEOUS = {self.GLOBAL_HOMOGENEOUS} "
                f"nor LOCAL_HOMOGENEOUS = {self.LOCAL_HOMOGENEOUS}"
            )
        for index, loader in enumerate(self.loaders):
            if loader.batch_size != batch_size:
                raise ValueError(f"loader {index} has batch size {loader.batch_size}, the combined loader {batch_size}")
        if logging_period < 1:
            raise ValueError(f"logging_period must be at least 1, got {logging_period}")
        if advance < 0:
            raise ValueError(f"advance must be at least 0, got {advance}")

    def __iter__(self) -> Iterator[Any]:
        iterators = [iter(loader) for loader in self.loaders]
        local = self.combining_mode == self.LOCAL_HOMOGENEOUS
        generator = np.random.default_rng([self._seed, distributed.get_rank()] if local else self._seed)
        generator.random(self._advance)  # a draw of `choice` takes one number
        self.loader_count = count = np.zeros(len(iterators))
        while True:
            drawn = generator.choice(len(iterators), p=self.ratios)
            try:
                batch = next(iterators[drawn])
            except StopIteration:
                return
            count[drawn] += 1
            n_batches = int(count.sum())
            if n_batches % self._logging_period == 0:
                shares = ", ".join(f"{share:.3f}" for share in count / n_batches)
                logger.info("%s: shares of the loaders in %d batches: %s", self.name or "combined", n_batches, shares)
            yield batch


def count_draws(ratios: Iterable[float], seed: int, n_draws: int) -> list[int]:
    """Count the batches that each loader has delivered after `n_draws` draws in the mode GLOBAL_HOMOGENEOUS.

    Args:
        ratios: of the loaders, as given to `CombinedDataLoader`.
        seed: as given to it.
        n_draws: number of batches that it has yielded.

    Returns:
        One number per loader.
    """
    shares = _normalize([float(ratio) for ratio in ratios], None)
    draws = np.random.default_rng(seed).choice(len(shares), size=n_draws, p=shares)
    return np.bincount(draws, minlength=len(shares)).tolist()


def _normalize(ratios: list[float], name: str | None) -> list[float]:
    if not ratios:
        raise ValueError("there must be at least one loader to combine")
    if not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
        raise ValueError(f"the ratios of combined loaders must be above 0, got {ratios}")
    total = sum(ratios)
    if abs(total - 1) <= _RATIO_TOLERANCE:
        return ratios
    logger.warning("%s: ratios %s add up to %g instead of 1 and are divided by it", name or "combined", ratios, total)
    return [ratio / total for ratio in ratios]
