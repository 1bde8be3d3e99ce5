"""The core of multi-scale deformable attention, next to its literal form with `grid_sample`, on CPUs.

    python benchmarks/deformable_attention.py [--cases pixel-decoder extractor] [--rounds 3] [--cpu-time --threads 1]
    python benchmarks/deformable_attention.py --memory

The literal form samples each level of a copy of the values with channels first, stacks the samples of all levels,
multiplies them by their weights and sums. Both get the same values, locations (around the cells of the queries, some of
them outside) and weights. `forward` is without gradients; `forward + backward` computes those of all three inputs.
Rounds interleave the two in alternating order; ratios are medians of the rounds' own ratios. `--memory` measures what
`forward` adds to the process at its peak, each way in its own process.
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

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov3.layers.deformable_attention import Shapes, cell_centres, ms_deform_attn

HEADS, POINTS = 16, 4
#: Levels that are sampled by the 5376 queries of an image of 512 x 512, and channels of a head.
CASES: dict[str, tuple[Shapes, int]] = {
    "pixel-decoder": ([(16, 16), (32, 32), (64, 64)], 128),
    "extractor": ([(32, 32)], 128),
}
QUERY_GRIDS = [(64, 64), (32, 32), (16, 16)]
#: Largest relative difference, in the mean, that counts as equal.
TOLERANCE = 1e-3
Inputs = tuple[Tensor, Shapes, Tensor, Tensor]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        print(measure_memory(*args.case))
    elif args.memory:
        report_memory(args)
    else:
        compare(args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="where others share the machine; with --threads 1")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--case", nargs=2, metavar=("WAY", "CASE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args: argparse.Namespace) -> None:
    clock = time.process_time if args.cpu_time else time.perf_counter
    kind = "processor seconds" if args.cpu_time else "seconds"
    print(f"torch {torch.__version__}, {args.threads} threads, {kind}, {args.rounds} rounds\n")
    print("| case | part | ours | grid_sample | ours / grid_sample | relative difference |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for case in args.cases:
        inputs = make_inputs(case)
        for part, run in {"forward": forward, "forward + backward": forward_backward}.items():
            results = {name: run(way, inputs) for name, way in WAYS.items()}
            # In the mean: gradients of locations jump where rounding moves a point into the next cell.
            difference = max(float((a - b).norm() / b.norm()) for a, b in zip(*results.values(), strict=True))
            if difference > TOLERANCE:
                raise SystemExit(f"{case}, {part}: the results differ by {difference}")
            del results
            seconds: dict[str, list[float]] = {name: [] for name in WAYS}
            order = list(WAYS)
            for _ in range(args.rounds):
                for name in order:
                    before = clock()
                    run(WAYS[name], inputs)
                    seconds[name].append(clock() - before)
                order.reverse()
            ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
            row = [case, part, *(f"{statistics.median(values):.2f}" for values in seconds.values()), f"{ratio:.2f}"]
            print(f"| {' | '.join(row)} | {difference:.0e} |", flush=True)


def make_inputs(case: str) -> Inputs:
    shapes, channels = CASES[case]
    generator = torch.Generator().manual_seed(0)
    n_cells = sum(height * width for height, width in shapes)
    references = cell_centres(QUERY_GRIDS)  # [1, Q, 1, 2]
    sizes = torch.tensor([(width, height) for height, width in shapes])[:, None]
    spread = (1, references.shape[1], HEADS, len(shapes), POINTS)
    offsets = 3 * torch.randn(*spread, 2, generator=generator)  # cells
    locations = references[:, :, None, :, None] + offsets / sizes
    weights = torch.randn(*spread, generator=generator).flatten(-2).softmax(-1).view(spread)
    return torch.randn(1, n_cells, HEADS, channels, generator=generator), shapes, locations, weights


def by_grid_sample(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    n, _, m, d = value.shape
    queries = locations.shape[1]
    samples = []
    for level, maps in enumerate(value.split([height * width for height, width in shapes], dim=1)):
        maps = maps.flatten(2).transpose(1, 2).reshape(n * m, d, *shapes[level])
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # [N M, Q, P, 2]
        samples.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    stacked = torch.stack(samples, dim=-2).flatten(-2)  # [N M, D, Q, L P]
    shares = weights.transpose(1, 2).reshape(n * m, 1, queries, -1)
    return (stacked * shares).sum(-1).view(n, m * d, queries).transpose(1, 2).contiguous()


@torch.no_grad()
def forward(way: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    return [way(*inputs)]


def forward_backward(way: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    value, shapes, locations, weights = inputs
    leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
    out = way(leaves[0], shapes, *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


WAYS: dict[str, Callable[..., Tensor]] = {"ours": ms_deform_attn, "grid_sample": by_grid_sample}


def report_memory(args: argparse.Namespace) -> None:
    print("| case | ours, MB | grid_sample, MB | ours / grid_sample | of ours the result |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for case in args.cases:
        added = [
            float(
                subprocess.run(
                    [sys.executable, __file__, "--case", way, case], check=True, capture_output=True, text=True
                ).stdout
            )
            for way in WAYS
        ]
        result = 4e-6 * sum(height * width for height, width in QUERY_GRIDS) * HEADS * CASES[case][1]
        print(f"| {case} | {added[0]:.0f} | {added[1]:.0f} | {added[0] / added[1]:.2f} | {result:.0f} |", flush=True)


def measure_memory(way: str, case: str) -> float:
    # MB; a small run first, so that libraries are loaded.
    value, shapes, locations, weights = make_inputs(case)
    forward(WAYS[way], (value, shapes, locations[:, :4].contiguous(), weights[:, :4].contiguous()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward(WAYS[way], (value, shapes, locations, weights))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6


if __name__ == "__main__":
    main()
