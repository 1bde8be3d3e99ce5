"""What to know before, or instead of, a long training: the data opens, the disk is large enough, one step works
(`--dry-run`), how long a step takes (`--benchmark-codebase`) and where its time goes (`--profiling`)."""

from __future__ import annotations

import itertools
import logging
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dinov3 import distributed
from dinov3.distributed import runtime
from dinov3.train.data_loading import (
    build_augmentation,
    build_collate,
    build_train_dataset,
    build_train_loader,
    crop_resolutions,
    images_per_process,
)
from dinov3.train.loop import Trainer
from dinov3.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger("dinov3")

FLOAT32_BYTES = 4
ADAMW_MOMENTS = 2  # beside each weight that is trained
CHECKPOINTS_AT_ONCE = 2

N_BENCHMARK_STEPS = 20
#: The first steps compile and allocate; their time is not counted.
N_WARM_UP_STEPS = 3

PROFILE_DIRECTORY = "profile"
N_SKIPPED, N_WARM_UP, N_RECORDED = 3, 1, 3
N_OPERATORS = 40


def check_dataset(cfg: Any) -> None:
    """Open the training data and decode one sample.

    Raises:
        ValueError: malformed dataset string, or less than one batch of images.
        FileNotFoundError: the data is not there.
        RuntimeError: the first image does not decode (unless `train.on_bad_image=skip`).
    """
    dataset = build_train_dataset(cfg, crop_resolutions(cfg)[0])
    if cfg.train.on_bad_image == "raise":
        dataset[0]
    logger.info("training data: %s, %d images", cfg.train.dataset_path, len(dataset))


def check_disk(model: nn.Module, output_dir: Path) -> None:
    """Refuse to start when the disk cannot hold the checkpoints that exist at the same time.

    Raises:
        RuntimeError: not enough free space; says how much is needed.
    """
    copies = ((1 + ADAMW_MOMENTS if parameter.requires_grad else 1, parameter) for parameter in model.parameters())
    needed = sum(count * parameter.numel() for count, parameter in copies) * FLOAT32_BYTES * CHECKPOINTS_AT_ONCE
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise RuntimeError(
            f"{output_dir} has {free / 2**30:.1f} GiB free, but {CHECKPOINTS_AT_ONCE} checkpoints need about "
            f"{needed / 2**30:.1f} GiB: free some space or choose another --output-dir"
        )


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
    """Make a training batch of noise: the augmentation's and the collate function's shapes, types and masks."""
    resolution = max(crop_resolutions(cfg), key=lambda resolution: resolution.global_size)
    augment, collate = build_augmentation(cfg, resolution), build_collate(cfg, resolution)
    side = resolution.gram_size or resolution.global_size
    noise = np.random.default_rng(0).integers(0, 256, (images_per_process(cfg), side, side, 3), dtype=np.uint8)
    return collate([(augment(Image.fromarray(pixels)), ()) for pixels in noise])


def step_profiler(output_dir: Path) -> torch.profiler.profile:
    """Return a context manager whose `step`, called after each training step, records the fifth to seventh.

    Each rank writes `<output_dir>/profile/trace.rank<r>.json`, for chrome://tracing or Perfetto, and
    `operators.rank<r>.txt`, the costliest operators. A run that is too short leaves no files, or those of fewer steps.
    """

    def write(profile: torch.profiler.profile) -> None:
        directory, rank = output_dir / PROFILE_DIRECTORY, distributed.get_rank()
        directory.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(directory / f"trace.rank{rank}.json"))
        sort_by = "self_cpu_time_total" if runtime.device().type == "cpu" else "self_device_time_total"
        table = profile.key_averages().table(sort_by=sort_by, row_limit=N_OPERATORS)
        (directory / f"operators.rank{rank}.txt").write_text(table, encoding="utf-8")
        logger.info("profile of %d steps: %s", N_RECORDED, directory)

    return torch.profiler.profile(
        # The first steps compile, allocate and fill caches.
        schedule=torch.profiler.schedule(wait=N_SKIPPED, warmup=N_WARM_UP, active=N_RECORDED, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
    )
