"""From the levels of a backbone to depth: our DPT head and bins, next to a literal form of their definition, on CPUs.

    python benchmarks/dpt.py [--heads chmv2 dd] [--sizes 224 384] [--rounds 3] [--cpu-time --threads 1]
    python benchmarks/dpt.py --memory [--sizes 512]

Both have the same random weights and get the same random levels of one image. The definition repeats class tokens and
concatenates them, upsamples before the 1x1 convolutions, keeps channels first, and turns all logits at once into
shifted values, weights and weighted bins. Three parts are timed: `depth`, from levels to metres without gradients;
`head`, from levels to logits; `bins`, from given logits of the same size to metres. Rounds interleave the two versions
in alternating order; ratios are medians of the rounds' own ratios. `--memory` measures what `depth` adds to the process
at its peak, each case in its own process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov3.heads.depth.dpt import DPTHead
from dinov3.heads.depth.features_to_depth import FeaturesToDepth
from dinov3.hub.depthers import config_of

PATCH = 16
#: The hub entry and the width of the backbone's levels.
HEADS = {"chmv2": ("dinov3_vitl16_chmv2", 1024), "dd": ("dinov3_vit7b16_dd", 4096)}
#: Largest difference of depths that counts as equal, relative to the largest depth.
TOLERANCE = 1e-4
Levels = list[tuple[Tensor, Tensor]]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        print(measure_memory(*args.case[:2], int(args.case[2])))
    elif args.memory:
        report_memory(args)
    else:
        compare(args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["chmv2", "dd"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 384], help="side of the image, in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="where others share the machine; with --threads 1")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--case", nargs=3, metavar=("WAY", "HEAD", "SIZE"), help=argparse.SUPPRESS)
    return parser.parse_args()


@torch.inference_mode()
def compare(args: argparse.Namespace) -> None:
    clock = time.process_time if args.cpu_time else time.perf_counter
    kind = "processor seconds" if args.cpu_time else "seconds"
    print(f"torch {torch.__version__}, {args.threads} threads, {kind}, {args.rounds} rounds\n")
    print("| head | px | part | ours | definition | definition / ours | largest difference, m |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for name in args.heads:
        head, bins = make_head(name), make_bins(name)
        for size in args.sizes:
            parts = make_parts(head, bins, make_levels(name, size))
            for part, ways in parts.items():
                seconds, difference = measure(ways, args.rounds, clock, to_depth=bins if part == "head" else None)
                ratios = [b / a for a, b in zip(seconds["ours"], seconds["definition"], strict=True)]
                row = [name, str(size), part, *(f"{statistics.median(values):.2f}" for values in seconds.values())]
                print(f"| {' | '.join(row)} | {statistics.median(ratios):.2f} | {difference:.0e} |", flush=True)


def make_parts(head: Any, bins: FeaturesToDepth, levels: Levels) -> dict[str, dict[str, Callable[[], Tensor]]]:
    logits = head(levels)
    return {
        "depth": {
            "ours": lambda: head(levels, mapping=bins),
            "definition": lambda: bins_by_definition(bins, head_by_definition(head, levels)),
        },
        "head": {"ours": lambda: head(levels), "definition": lambda: head_by_definition(head, levels)},
        "bins": {"ours": lambda: bins(logits), "definition": lambda: bins_by_definition(bins, logits)},
    }


def measure(
    ways: dict[str, Callable[[], Tensor]], rounds: int, clock: Callable[[], float], to_depth: nn.Module | None
) -> tuple[dict[str, list[float]], float]:
    """Seconds of each round, and the largest difference of the depths."""
    results = {name: way() for name, way in ways.items()}
    depths = [result if to_depth is None else to_depth(result) for result in results.values()]
    difference = float((depths[0] - depths[1]).abs().max())
    if difference > TOLERANCE * float(depths[1].max()):
        raise SystemExit(f"ours and the definition differ by {difference} m")
    del results, depths
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for _ in range(rounds):
        for name in order:
            before = clock()
            ways[name]()
            seconds[name].append(clock() - before)
        order.reverse()
    return seconds, difference


def make_head(name: str) -> Any:
    entry, width = HEADS[name]
    config = config_of(entry)
    torch.manual_seed(0)
    return DPTHead(
        in_channels=[width] * 4,
        n_output_channels=config.n_output_channels,
        readout_type="project" if config.use_cls_token else "ignore",
        use_batchnorm=config.use_batchnorm,
        **config.head_kwargs,
    ).eval()


def make_bins(name: str) -> FeaturesToDepth:
    config = config_of(HEADS[name][0])
    return FeaturesToDepth(config.min_depth, config.max_depth, config.bins_strategy, config.norm_strategy)


def make_levels(name: str, size: int) -> Levels:
    generator, width, n = torch.Generator().manual_seed(1), HEADS[name][1], size // PATCH
    shapes = ((1, width, n, n), (1, width))
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(4)]  # type: ignore[misc]


def head_by_definition(head: Any, levels: Levels) -> Tensor:
    """Logits of a DPT head, step by step, with the weights of `head`."""

    def residual(unit: Any, x: Tensor) -> Tensor:
        return x + unit.conv2.conv(F.relu(unit.conv1.conv(F.relu(x))))

    blocks, pyramid = head.reassemble_blocks, []
    for i, (patches, token) in enumerate(levels):
        if blocks.readout_type == "project":
            repeated = token[:, :, None, None].expand_as(patches)
            tokens = torch.cat([patches, repeated], dim=1).flatten(2).transpose(1, 2)  # [B, N, 2 C]
            patches = blocks.readout_projects[i](tokens).transpose(1, 2).reshape(patches.shape)
        if blocks.use_batchnorm:
            patches = blocks.batchnorm_layers[i](patches)
        pyramid.append(head.convs[i].conv(blocks.resize_layers[i](blocks.projects[i].conv(patches))))
    x = None
    for block, skip in zip(head.fusion_blocks, reversed(pyramid), strict=True):
        if x is None:
            x = skip
        else:
            if skip.shape != x.shape:
                skip = F.interpolate(skip, size=x.shape[-2:], mode="bilinear", align_corners=False)
            x = x + residual(block.res_conv_unit1, skip)
        x = F.interpolate(residual(block.res_conv_unit2, x), scale_factor=2, mode="bilinear", align_corners=True)
        x = block.project.conv(x)
    if head.project is not None:
        x = F.relu(head.project.conv(x))
    return head.conv_depth.head(x)


def bins_by_definition(bins: FeaturesToDepth, x: Tensor) -> Tensor:
    """Depth as the weighted mean of the bins, all temporaries at full size."""
    a, m, k = bins.min_depth, bins.max_depth, x.shape[1]
    x = x.relu()
    if bins.norm_strategy == "linear":
        x = x + 0.1
        x = x / x.sum(dim=1, keepdim=True)
        return (x * torch.linspace(a, m, k)[:, None, None]).sum(dim=1, keepdim=True)
    ends = torch.tensor([a, m / 8]).log().tolist()
    share = torch.linspace(1, 0, k)
    centres = share * torch.linspace(*ends, k).exp() + (1 - share) * torch.linspace(a, m / 8, k)
    x = x + ((-x.amin(dim=1, keepdim=True)).clamp(0, 1e-4) + 1e-8)
    total = x.sum(dim=1, keepdim=True)
    total = torch.where(total.isfinite(), total, torch.ones_like(total)).clamp(min=1e-12)
    weighted = x / total * centres.clamp(min=1e-12)[:, None, None]
    return 8 * weighted.sum(dim=1, keepdim=True).clamp(min=1e-12)


def report_memory(args: argparse.Namespace) -> None:
    print("| head | px | ours, MiB | definition, MiB |")
    print("| --- | ---: | ---: | ---: |")
    for head in args.heads:
        for size in args.sizes:
            peaks = []
            for way in ("ours", "definition"):
                command = [sys.executable, __file__, "--threads", str(args.threads), "--case", way, head, str(size)]
                peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
            print(f"| {head} | {size} | {peaks[0]:.0f} | {peaks[1]:.0f} |", flush=True)


@torch.inference_mode()
def measure_memory(way: str, name: str, size: int) -> float:
    head, bins = make_head(name), make_bins(name)

    def run(levels: Levels) -> None:
        if way == "ours":
            head(levels, mapping=bins)
        else:
            bins_by_definition(bins, head_by_definition(head, levels))

    run(make_levels(name, PATCH))  # what is loaded at the first call
    levels = make_levels(name, size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(levels)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    main()
