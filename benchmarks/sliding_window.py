"""Sliding-window segmentation of a large image, against adding windows one by one, on the CPU.

    python benchmarks/sliding_window.py [--classes 19 150] [--size 1024 2048] [--crop 512] [--stride 341] ...

A ViT-S/16 with a linear head, both of random weights. The ways: `slide_inference` with one window a call (its default
on the CPU) and with several; a loop that predicts one window at a time and adds it into its place; and the published
form of that loop, which pads each window's map with zeros to the size of the image and adds that. Rounds interleave
them; ratios are medians of the rounds' own ratios. "Elsewhere" is what is not spent in `predict`: sums, counts,
averaging.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov3.eval.segmentation.inference import slide_inference
from dinov3.heads.segmentation import FeatureDecoder, build_segmentation_decoder
from dinov3.hub.backbones import dinov3_vits16

OURS = "ours, one window a call"
Window = tuple[slice, slice]


class Timed:
    """A model whose `predict` counts its seconds."""

    def __init__(self, model: FeatureDecoder, clock: Callable[[], float]) -> None:
        self.model = model
        self.clock = clock
        self.seconds = 0.0

    def predict(self, x: Tensor, rescale_to: Sequence[int]) -> Tensor:
        before = self.clock()
        prediction = self.model.predict(x, rescale_to=rescale_to)
        self.seconds += self.clock() - before
        return prediction


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds")
    for n_classes in args.classes:
        compare(args, n_classes)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[19, 150])
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 2048], help="height and width of the image")
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--stride", type=int, default=341)
    parser.add_argument("--windows", type=int, nargs="*", default=[2, 6], help="windows in one call")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="where others share the machine; with --threads 1")
    return parser.parse_args()


def compare(args: argparse.Namespace, n_classes: int) -> None:
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.manual_seed(0)
    decoder = build_segmentation_decoder(dinov3_vits16(pretrained=False), "LAST", num_classes=n_classes)
    model, image = Timed(decoder.eval(), clock), torch.randn(1, 3, *args.size)
    crop, stride = (args.crop, args.crop), (args.stride, args.stride)
    slide = partial(slide_inference, image, model, "linear", n_classes, crop, stride)
    ways: dict[str, Callable[[], Tensor]] = {
        OURS: slide,
        **{f"ours, {n} windows a call": partial(slide, max_windows_per_batch=n) for n in args.windows},
        "loop, into place": lambda: one_by_one(image, model, n_classes, args, into_place=True),
        "loop, padded to the image": lambda: one_by_one(image, model, n_classes, args, into_place=False),
    }
    model.predict(image[..., : args.crop, : args.crop], rescale_to=crop)  # what is set up at the first call
    total: dict[str, list[float]] = {name: [] for name in ways}
    elsewhere: dict[str, list[float]] = {name: [] for name in ways}
    difference: dict[str, float] = {}
    reference = slide()
    order = list(ways)
    for _ in range(args.rounds):
        for name in order:
            model.seconds, before = 0.0, clock()
            result = ways[name]()
            total[name].append(clock() - before)
            elsewhere[name].append(total[name][-1] - model.seconds)
            difference[name] = float((result - reference).abs().max())
            del result
        order = order[1:] + order[:1]
    n_windows = len(list(windows(args)))
    print(f"\n{n_classes} classes, {args.size[0]} x {args.size[1]}, {n_windows} windows of {args.crop}\n")
    report(total, elsewhere, difference)


@torch.no_grad()
def one_by_one(image: Tensor, model: Timed, n_classes: int, args: argparse.Namespace, *, into_place: bool) -> Tensor:
    height, width = args.size
    total, count = torch.zeros(1, n_classes, height, width), torch.zeros(1, 1, height, width)
    for rows, columns in windows(args):
        logits = model.predict(image[..., rows, columns], rescale_to=(args.crop, args.crop))
        if into_place:
            total[..., rows, columns] += logits
        else:
            total += F.pad(logits, (columns.start, width - columns.stop, rows.start, height - rows.stop))
        count[..., rows, columns] += 1
    return total / count


def windows(args: argparse.Namespace) -> Iterator[Window]:
    starts = [
        [min(first, side - args.crop) for first in range(0, side - args.crop + args.stride, args.stride)]
        for side in args.size
    ]
    for top in starts[0]:
        for left in starts[1]:
            yield slice(top, top + args.crop), slice(left, left + args.crop)


def report(total: dict[str, list[float]], elsewhere: dict[str, list[float]], difference: dict[str, float]) -> None:
    print("| | seconds | times ours | of these elsewhere | elsewhere, times ours | largest difference |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in total:
        whole, rest = (
            statistics.median(a / b for a, b in zip(values[name], values[OURS], strict=True))
            for values in (total, elsewhere)
        )
        seconds, rest_seconds = statistics.median(total[name]), statistics.median(elsewhere[name])
        row = f"{name} | {seconds:.2f} | {whole:.2f} | {rest_seconds:.2f} | {rest:.2f} | {difference[name]:.0e}"
        print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
