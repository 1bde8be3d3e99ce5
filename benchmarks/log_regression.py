"""The sweep of a logistic regression in torch, beside a loop of scikit-learn fits, on the CPU.

    python benchmarks/log_regression.py [--rows 20000] [--dim 384] [--classes 100] [--stride 4] [--rounds 2] ...

Features are noisy copies of one centre per class, on axes of decreasing length, as those of a backbone are. Both fit
the same values of C: every `--stride`-th of the published grid. scikit-learn does it in a loop, cold, with the
published settings (float64, tol 1e-12, at most 1000 iterations) and with float32 arrays; ours is `fit_with_torch`,
with products in float32 and at last in float64. Rounds interleave the three; ratios are medians of the rounds' own
ratios. Beneath: the accuracy and the objective of each value of C.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov3.eval.classification.log_regression_module import C_VALUES
from dinov3.eval.classification.log_regression_solvers import Fit, fit_with_sklearn, fit_with_torch

TOL, MAX_ITERATIONS = 1e-12, 1000


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    (features, labels), test = (make_rows(n, args, seed) for seed, n in enumerate((args.rows, 5000)))
    Cs = [value for value in C_VALUES[:: args.stride] if value <= args.largest_c]
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds")
    print(f"{args.rows} x {args.dim}, {args.classes} classes, {len(Cs)} values of C from {Cs[0]:.0e} to {Cs[-1]:.0e}\n")
    sweeps: dict[str, Callable[[], list[Fit]]] = {
        "ours": lambda: fit_ours(features, labels, Cs),
        "sklearn float64": lambda: [fit_theirs(features, labels, C, torch.float64) for C in Cs],
        "sklearn float32": lambda: [fit_theirs(features, labels, C, torch.float32) for C in Cs],
    }
    fit_ours(features[:500], labels[:500], Cs[:1])  # what is loaded at the first call
    fit_theirs(features[:500], labels[:500], Cs[0], torch.float64)
    seconds: dict[str, list[float]] = {name: [] for name in sweeps}
    fits: dict[str, list[Fit]] = {}
    order = list(sweeps)
    for _ in range(args.rounds):
        for name in order:
            before = clock()
            fits[name] = sweeps[name]()
            seconds[name].append(clock() - before)
        order = order[1:] + order[:1]
    report_times(seconds)
    report_fits(fits, Cs, features, labels, test)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--stride", type=int, default=4, help="1 is the whole grid of 45 values")
    parser.add_argument("--largest-c", type=float, default=float("inf"))
    parser.add_argument("--separation", type=float, default=0.25, help="length of centres, relative to the noise")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="where others share the machine; with --threads 1")
    return parser.parse_args()


def make_rows(n: int, args: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """Features [n, dim] and labels [n]."""
    shared, own = (torch.Generator().manual_seed(number) for number in (1000, seed))
    labels = torch.arange(n) % args.classes
    centres = args.separation * torch.randn(args.classes, args.dim, generator=shared)
    origin = torch.randn(args.dim, generator=shared)
    features = centres[labels] + origin + torch.randn(n, args.dim, generator=own)
    return features * torch.logspace(0, -1.5, args.dim), labels


def fit_ours(features: Tensor, labels: Tensor, Cs: list[float]) -> list[Fit]:
    fits = fit_with_torch(
        features,
        labels,
        Cs,
        device=torch.device("cpu"),
        tol=TOL,
        max_iterations=MAX_ITERATIONS,
        dtypes=[torch.float32, torch.float64],
        memory_budget_bytes=2**32,
    )
    return list(fits)


def fit_theirs(features: Tensor, labels: Tensor, C: float, dtype: torch.dtype) -> Fit:
    return fit_with_sklearn(features, labels, C, tol=TOL, max_iterations=MAX_ITERATIONS, dtype=dtype)


def report_times(seconds: dict[str, list[float]]) -> None:
    print("| | seconds | times ours |\n| --- | ---: | ---: |")
    for name, values in seconds.items():
        ratio = statistics.median(value / ours for value, ours in zip(values, seconds["ours"], strict=True))
        print(f"| {name} | {statistics.median(values):.1f} | {ratio:.1f} |")


def report_fits(
    fits: dict[str, list[Fit]], Cs: list[float], features: Tensor, labels: Tensor, test: tuple[Tensor, Tensor]
) -> None:
    print(
        "\n| C | iterations ours, sklearn | top-1 ours, sklearn | equal predictions | objective, ours above sklearn |"
    )
    print("| ---: | ---: | ---: | ---: | ---: |")
    for index, C in enumerate(Cs):
        pair = fits["ours"][index], fits["sklearn float64"][index]
        ours, theirs = ((test[0].double() @ fit.weights.T + fit.intercept).argmax(dim=1) for fit in pair)
        accuracy = [100 * float((found == test[1]).double().mean()) for found in (ours, theirs)]
        values = [objective(fit, features, labels, C) for fit in pair]
        print(
            f"| {C:.2g} | {pair[0].n_iterations}, {pair[1].n_iterations} | {accuracy[0]:.2f}, {accuracy[1]:.2f} "
            f"| {100 * float((ours == theirs).double().mean()):.2f} % | {values[0] / values[1] - 1:.0e} |"
        )


def objective(fit: Fit, features: Tensor, labels: Tensor, C: float) -> float:
    logits = features.double() @ fit.weights.T + fit.intercept
    return float(F.cross_entropy(logits, labels, reduction="sum") + fit.weights.square().sum() / (2 * C))


if __name__ == "__main__":
    main()
