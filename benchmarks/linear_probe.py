"""One training step, and one validation, of the 13 classifiers of linear probing, as a Markdown table.

    OMP_NUM_THREADS=1 python benchmarks/linear_probe.py [--steps 20] > benchmarks/linear_probe.md

"Separate" is the straightforward way: every classifier makes its own input, product and loss. The backbone is left out:
tokens are random. The two take turns, step by step, and start from the same weights, which are compared at the end.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dinov3.eval.classification.linear_config import LossType, OptimizerType, TrainConfig
from dinov3.eval.classification.linear_heads import AllClassifiers, create_linear_input, setup_linear_classifiers

SIZES = ((384, 100, 128), (384, 1000, 128), (1024, 1000, 128))  # width, classes, batch
N_PATCHES = 196


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    device = f"{torch.get_num_threads()} thread(s), {platform.machine()}, torch {torch.__version__}"
    print(f"# Training step of 13 linear classifiers\n\n`{device}`, {args.steps} steps each, in turns; medians.\n")
    print("| width | classes | batch | separate, ms | fused, ms | ratio | largest difference of weights |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for width, n_classes, batch in SIZES:
        separate, fused, difference = measure(width, n_classes, batch, args.steps)
        print(
            f"| {width} | {n_classes} | {batch} | {1e3 * separate:.1f} | {1e3 * fused:.1f} | "
            f"{separate / fused:.2f}x | {difference:.1e} |",
            flush=True,
        )


def measure(width: int, n_classes: int, batch: int, n_steps: int) -> tuple[float, float, float]:
    """Median seconds of a separate and of a fused step, and the largest difference of the weights at the end."""
    generator = torch.Generator().manual_seed(0)
    tokens = [
        (torch.randn(batch, N_PATCHES, width, generator=generator), torch.randn(batch, width, generator=generator))
    ]
    labels = torch.randint(n_classes, (batch,), generator=generator)
    grids = [make_grid(tokens, n_classes, batch) for _ in range(2)]
    steps: list[Callable[[], None]] = [
        lambda: separate_step(*grids[0], tokens, labels),
        lambda: fused_step(*grids[1], tokens, labels),
    ]
    times: list[list[float]] = [[], []]
    for _ in range(n_steps + 2):
        for step, seconds in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    weights = [list(grid[0].state_dict().values()) for grid in grids]
    difference = max((a - b).abs().max().item() for a, b in zip(*weights, strict=True))
    return statistics.median(times[0][2:]), statistics.median(times[1][2:]), difference


def make_grid(
    tokens: list[tuple[Tensor, Tensor]], n_classes: int, batch: int
) -> tuple[AllClassifiers, torch.optim.Optimizer]:
    rates = TrainConfig(dataset="", val_dataset="").learning_rates
    classifiers, groups = setup_linear_classifiers(tokens, [1], rates, batch, n_classes)
    return classifiers, OptimizerType.SGD.get_optimizer(groups)


def separate_step(
    classifiers: AllClassifiers,
    optimizer: torch.optim.Optimizer,
    tokens: list[tuple[Tensor, Tensor]],
    labels: Tensor,
) -> None:
    criterion = torch.nn.CrossEntropyLoss()
    losses = [criterion(logits, labels) for logits in classifiers(tokens).values()]
    optimizer.zero_grad()
    torch.stack(losses).sum().backward()
    optimizer.step()


def fused_step(
    classifiers: AllClassifiers,
    optimizer: torch.optim.Optimizer,
    tokens: list[tuple[Tensor, Tensor]],
    labels: Tensor,
) -> None:
    inputs = create_linear_input(tokens, 1, use_avgpool=True)
    classifiers.fused.backward(inputs, labels, LossType.CROSS_ENTROPY.get_criterion())
    optimizer.step()


if __name__ == "__main__":
    main()
