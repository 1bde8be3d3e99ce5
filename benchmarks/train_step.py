"""Median time and peak memory of a training step, and where the time goes.

    python benchmarks/train_step.py [--config-file CONFIG.yaml] [--steps 20] [--threads N] [key=value ...]

Without a configuration file it measures the small configuration of the golden cases: ViT-S/16, batch 3, two 64 px and
three 32 px crops, heads with 48 and 40 prototypes. Batches are random images, so that decoding takes no part.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from dinov3.configs import DinoV3SetupArgs, apply_scaling_rules_to_cfg, get_cfg_from_args
from dinov3.distributed import runtime
from dinov3.train.data_loading import build_collate, crop_resolutions
from dinov3.train.schedules import build_schedulers, settings_at
from dinov3.train.step import train_step
from dinov3.train.train import build_model

SMALL = [
    "student.arch=vit_small",
    "student.patch_size=16",
    "student.drop_path_rate=0.0",
    "student.n_storage_tokens=2",
    "student.mask_k_bias=true",
    "student.pos_embed_rope_dtype=fp32",
    *(f"dino.{key}" for key in ("head_n_prototypes=48", "head_hidden_dim=64", "head_bottleneck_dim=24")),
    *(f"ibot.{key}" for key in ("head_n_prototypes=40", "head_hidden_dim=56", "head_bottleneck_dim=20")),
    "crops.global_crops_size=64",
    "crops.local_crops_size=32",
    "crops.local_crops_number=3",
    "train.compile=false",
    "train.batch_size_per_gpu=3",
    "compute_precision.param_dtype=fp32",
]


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    options = args.options if args.config_file else [*SMALL, *args.options]
    cfg = get_cfg_from_args(DinoV3SetupArgs(config_file=args.config_file, output_dir=None, opts=options))
    apply_scaling_rules_to_cfg(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    model.init_weights()
    optimizer = torch.optim.AdamW(model.get_params_groups())
    schedules = build_schedulers(cfg)
    batch = random_batch(cfg)

    phases = time_phases(model, optimizer)
    seconds = []
    for iteration in range(args.warmup + args.steps):
        if iteration == args.warmup:
            phases.clear()
        runtime.synchronize()
        started = time.perf_counter()
        settings = settings_at(schedules, iteration)
        train_step(model, optimizer, batch, settings, iteration=iteration, clip_grad=cfg.optim.clip_grad)
        runtime.synchronize()
        if iteration >= args.warmup:
            seconds.append(time.perf_counter() - started)
    report(cfg, model, seconds, phases)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("options", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def random_batch(cfg: Any) -> dict[str, Any]:
    """A collated batch of noise at the first crop resolution."""
    resolution = crop_resolutions(cfg)[0]

    def crops(count: int, size: int) -> list[torch.Tensor]:
        return [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(count)]

    n_local = cfg.crops.local_crops_number
    samples = [
        ({"global_crops": crops(2, resolution.global_size), "local_crops": crops(n_local, resolution.local_size)}, ())
        for _ in range(cfg.train.batch_size_per_gpu)
    ]
    return build_collate(cfg, resolution)(samples) | {"global_batch_size": len(samples)}


def time_phases(model: Any, optimizer: Any) -> dict[str, list[float]]:
    """Wrap the phases of a step so that each call's duration is recorded."""
    phases: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            runtime.synchronize()
            started = time.perf_counter()
            result = function(*args, **kwargs)
            runtime.synchronize()
            phases[name].append(time.perf_counter() - started)
            return result

        return wrapper

    for name, method in (
        ("teacher forward, Sinkhorn", "get_teacher_output"),
        ("student forward", "get_student_output"),
        ("losses", "compute_losses"),
        ("backward", "backprop_loss"),
        ("EMA update", "update_ema"),
    ):
        setattr(model, method, timed(name, getattr(model, method)))
    optimizer.step = timed("AdamW step", optimizer.step)
    return phases


def report(cfg: Any, model: Any, seconds: list[float], phases: dict[str, list[float]]) -> None:
    """Print the table."""
    median = statistics.median(seconds)
    batch_size = cfg.train.batch_size_per_gpu
    n_parameters = sum(parameter.numel() for parameter in model.student.parameters())
    print(f"{cfg.student.arch}/{cfg.student.patch_size}, batch {batch_size}, {n_parameters / 1e6:.1f} M parameters,")
    print(f"{runtime.device()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {len(seconds)} steps")
    print(f"step        {median * 1e3:9.1f} ms median ({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f})")
    print(f"images      {batch_size / median:9.1f} /s")
    print(f"peak memory {runtime.max_memory_mib():9.0f} MiB")
    rest = median
    for name, durations in phases.items():
        share = statistics.median(durations)
        rest -= share
        print(f"  {name:<28}{share * 1e3:9.1f} ms {share / median:6.1%}")
    print(f"  {'clipping, schedules, rest':<28}{rest * 1e3:9.1f} ms {rest / median:6.1%}")


if __name__ == "__main__":
    main()
