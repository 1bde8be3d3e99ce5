"""Runs that leave nothing behind: `--dry-run`, one step on the real data, and `--benchmark-codebase`, many on noise."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import numpy as np
from PIL import Image

from dinov3.distributed import runtime
from dinov3.train.data_loading import (
    build_augmentation,
    build_collate,
    build_train_loader,
    crop_resolutions,
    images_per_process,
)
from dinov3.train.loop import Trainer
from dinov3.train.ssl_meta_arch import SSLMetaArch

N_BENCHMARK_STEPS = 20
#: The first steps compile and allocate; their time is not counted.
N_WARM_UP_STEPS = 3


def dry_run(cfg: Any, model: SSLMetaArch) -> dict[str, float]:
    """Initialise `model`, take one step on the data of `cfg`, print what it took.

    Args:
        cfg: the training configuration.
        model: prepared for training, not initialised.

    Returns:
        The metrics of the step, with `seconds` and `max_memory_mib`.
    """
    model.init_weights()
    trainer = Trainer(cfg, model)
    started = time.perf_counter()
    loader = build_train_loader(cfg)
    batches = list(itertools.islice(iter(loader), trainer.batches_per_step))
    loaded = time.perf_counter()
    result = trainer.step(batches, 0)
    runtime.synchronize()
    seconds = time.perf_counter() - loaded
    metrics = {name: float(value) for name, value in result.metrics.items()}
    print(
        f"dry run: loss {metrics['total_loss']:.4f}, {trainer.global_batch_size} images loaded in "
        f"{loaded - started:.2f} s, step in {seconds:.2f} s, {runtime.max_memory_mib():.0f} MiB"
    )
    print(f"dry run: {result.problem or 'everything works'}; nothing was written")
    return metrics | {"seconds": seconds, "max_memory_mib": runtime.max_memory_mib()}


def benchmark(cfg: Any, model: SSLMetaArch, n_steps: int = N_BENCHMARK_STEPS) -> dict[str, float]:
    """Time training steps on one batch of synthetic images, without loading; print step time and memory.

    Args:
        cfg: the training configuration; with several crop resolutions the largest is taken.
        model: prepared for training, not initialised.
        n_steps: how many are timed.

    Returns:
        `seconds` (median), `fastest`, `slowest`, `images_per_second` of all processes, and `max_memory_mib`.
    """
    model.init_weights()
    trainer = Trainer(cfg, model)
    batches = [synthetic_batch(cfg) for _ in range(trainer.batches_per_step)]
    times = []
    for iteration in range(N_WARM_UP_STEPS + n_steps):
        started = time.perf_counter()
        # A copy, because the trainer takes entries out of a batch.
        trainer.step([dict(batch) for batch in batches], iteration % trainer.n_iterations)
        runtime.synchronize()
        times.append(time.perf_counter() - started)
    times = times[N_WARM_UP_STEPS:]
    figures = {
        "seconds": statistics.median(times),
        "fastest": min(times),
        "slowest": max(times),
        "images_per_second": trainer.global_batch_size / statistics.median(times),
        "max_memory_mib": runtime.max_memory_mib(),
    }
    print(
        f"benchmark: {n_steps} steps of {trainer.global_batch_size} images, "
        f"{figures['seconds']:.4f} s each ({figures['fastest']:.4f} to {figures['slowest']:.4f}), "
        f"{figures['images_per_second']:.1f} images/s, {figures['max_memory_mib']:.0f} MiB"
    )
    return figures


def synthetic_batch(cfg: Any) -> dict[str, Any]:
    """A batch of the training made of noise: the augmentation's and the collate function's shapes, types and masks."""
    resolution = max(crop_resolutions(cfg), key=lambda resolution: resolution.global_size)
    augment, collate = build_augmentation(cfg, resolution), build_collate(cfg, resolution)
    side = resolution.gram_size or resolution.global_size
    noise = np.random.default_rng(0).integers(0, 256, (images_per_process(cfg), side, side, 3), dtype=np.uint8)
    return collate([(augment(Image.fromarray(pixels)), ()) for pixels in noise])
