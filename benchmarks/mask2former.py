"""Mask2Former on CPUs: where the time of a small segmentor goes, and what semantic scores add to its memory.

    python benchmarks/mask2former.py [--size 512] [--rounds 3] [--cpu-time --threads 1]
    python benchmarks/mask2former.py --scores [--rounds 3] [--cpu-time --threads 1]

The segmentor is a ViT-S/16 with a head of hidden_dim=256, ffn_dim=1024, 3 encoder and 6 decoder layers, all with random
weights; each round runs its parts one after the other on one image, and shares are medians of the rounds' own shares.
`--scores` compares `semantic_scores` of 100 queries x 150 classes at 896 x 896, from masks of 224 x 224, with the
literal form, which resizes all masks and multiplies them at once: seconds in interleaved rounds, and what each adds to
its own process at its peak.
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

from dinov3.heads.mask2former.semantic import semantic_scores
from dinov3.heads.segmentation import FeatureDecoder, build_segmentation_decoder
from dinov3.hub.backbones import dinov3_vits16

SMALL = {"hidden_dim": 256, "ffn_dim": 1024, "n_encoder_layers": 3, "n_decoder_layers": 6}
N_QUERIES, N_CLASSES, MASK_SIDE, SIDE = 100, 150, 224, 896


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        print(measure_memory(args.case))
    elif args.scores:
        compare_scores(args)
    else:
        report_parts(args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the image, in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="where others share the machine; with --threads 1")
    parser.add_argument("--scores", action="store_true")
    parser.add_argument("--case", metavar="WAY", help=argparse.SUPPRESS)
    return parser.parse_args()


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    kind = "processor seconds" if args.cpu_time else "seconds"
    print(f"torch {torch.__version__}, {args.threads} threads, {kind}, {args.rounds} rounds\n")
    return time.process_time if args.cpu_time else time.perf_counter


def make_segmentor() -> FeatureDecoder:
    torch.manual_seed(0)
    backbone = dinov3_vits16(pretrained=False)
    return build_segmentation_decoder(backbone, decoder_type="m2f", num_classes=N_CLASSES, **SMALL).eval()


@torch.inference_mode()
def report_parts(args: argparse.Namespace) -> None:
    clock, model = clock_of(args), make_segmentor()
    adapter, head = model.segmentation_model
    x = torch.randn(1, 3, args.size, args.size, generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {"backbone": [], "adapter": [], "pixel decoder": [], "mask decoder": []}
    for round_number in range(args.rounds + 1):
        before = clock()
        adapter._read_backbone(x)
        read = clock()
        features = adapter(x)  # runs the backbone, too
        adapted = clock()
        mask_features, maps = head.pixel_decoder(features)
        decoded = clock()
        head.predictor(maps, mask_features, only_last=True)
        after = clock()
        if round_number:  # the first one warms up
            spent = (read - before, adapted - read - (read - before), decoded - adapted, after - decoded)
            for part, value in zip(seconds, spent, strict=True):
                seconds[part].append(value)
    n_parameters = {
        "backbone": sum(p.numel() for p in adapter.backbone.parameters()),
        "adapter": sum(p.numel() for name, p in adapter.named_parameters() if not name.startswith("backbone.")),
        "pixel decoder": sum(p.numel() for p in head.pixel_decoder.parameters()),
        "mask decoder": sum(p.numel() for p in head.predictor.parameters()),
    }
    totals = [sum(values) for values in zip(*seconds.values(), strict=True)]
    print("| part | parameters, M | seconds | share of the time |")
    print("| --- | ---: | ---: | ---: |")
    for part, values in seconds.items():
        share = statistics.median(value / total for value, total in zip(values, totals, strict=True))
        print(f"| {part} | {n_parameters[part] / 1e6:.1f} | {statistics.median(values):.2f} | {share:.0%} |")
    print(f"| all | {sum(n_parameters.values()) / 1e6:.1f} | {statistics.median(totals):.2f} | |")


def at_once(logits: Tensor, masks: Tensor, size: tuple[int, int]) -> Tensor:
    resized = F.interpolate(masks, size, mode="bilinear", align_corners=False)
    return torch.einsum("bqk,bqhw->bkhw", logits.softmax(-1)[..., :-1], resized.sigmoid())


WAYS: dict[str, Callable[[Tensor, Tensor, tuple[int, int]], Tensor]] = {"ours": semantic_scores, "at once": at_once}


def predictions() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    masks = 4 * torch.randn(1, N_QUERIES, MASK_SIDE, MASK_SIDE, generator=generator)
    return torch.randn(1, N_QUERIES, N_CLASSES + 1, generator=generator), masks


@torch.inference_mode()
def compare_scores(args: argparse.Namespace) -> None:
    # First, because a new process counts the peak of the one that starts it as its own.
    added = {name: run_measurement(name, args.threads) for name in WAYS}
    clock, (logits, masks), size = clock_of(args), predictions(), (SIDE, SIDE)
    results = {name: way(logits, masks, size) for name, way in WAYS.items()}
    difference = float((results["ours"] - results["at once"]).abs().max() / results["at once"].max())
    if difference > 1e-4:
        raise SystemExit(f"the results differ by {difference}")
    del results
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    order = list(WAYS)
    for _ in range(args.rounds):
        for name in order:
            before = clock()
            WAYS[name](logits, masks, size)
            seconds[name].append(clock() - before)
        order.reverse()
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    print("| way | seconds | MB added | times the result |")
    print("| --- | ---: | ---: | ---: |")
    for name, values in seconds.items():
        times = added[name] / (4e-6 * N_CLASSES * SIDE * SIDE)
        print(f"| {name} | {statistics.median(values):.2f} | {added[name]:.0f} | {times:.2f} |")
    print(f"\nours takes {ratio:.2f} times the seconds; relative difference {difference:.0e}")


def run_measurement(way: str, threads: int) -> float:
    command = [sys.executable, __file__, "--threads", str(threads), "--case", way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@torch.inference_mode()
def measure_memory(way: str) -> float:
    # MB; a small run first, so that libraries are loaded.
    logits, masks = predictions()
    WAYS[way](logits, masks[..., :8, :8].contiguous(), (16, 16))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    WAYS[way](logits, masks, (SIDE, SIDE))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6


if __name__ == "__main__":
    main()
