"""The detector's attention with a box-relative bias, and its input projection, against their literal forms, on CPUs.

    python benchmarks/detection.py [--rounds 3] [--cpu-time --threads 1]

Sizes are those at 1024 x 1024: 64 x 64 cells, 1500 queries, 8 heads, width 768; maps of 2 x 4096 channels, of which the
first half comes from 22 x 22 cells. Seconds are of interleaved rounds; memory is what each way adds to its own process
at its peak.
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

from dinov3.heads.plain_detr.decoder import BoxRelativeAttention
from dinov3.layers.resizing import resize_antialiased

SIDE, N_QUERIES, DIM, N_CHANNELS, CONTEXT_SIDE = 64, 1500, 768, 4096, 22


def attention_inputs() -> tuple[BoxRelativeAttention, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    module = BoxRelativeAttention(DIM, 8, 512, "linear", 16).requires_grad_(False)
    corners = (torch.rand(1, N_QUERIES, 4) * 1024).sort(dim=-1).values[..., [0, 1, 2, 3]]
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    return module, torch.randn(1, N_QUERIES, DIM), torch.randn(1, SIDE * SIDE, DIM), corners, mask


def attention_ours(module: BoxRelativeAttention, query: Tensor, cells: Tensor, corners: Tensor, mask: Tensor) -> Tensor:
    return module(query, cells, cells, corners, mask)


def attention_literal(
    module: BoxRelativeAttention, query: Tensor, cells: Tensor, corners: Tensor, mask: Tensor
) -> Tensor:
    centres = (torch.arange(SIDE) + 0.5) * module.stride
    x, y = corners[..., None, 0::2], corners[..., None, 1::2]
    bias = (
        module.cpb_mlp2(y - centres[:, None])[:, :, :, None] + module.cpb_mlp1(x - centres[:, None])[:, :, None]
    ).flatten(2, 3)  # [B, Q, N, heads]
    bias = bias.permute(0, 3, 1, 2)
    bias += mask.flatten(1)[:, None, None] * -100.0
    projections = ((module.q, query), (module.k, cells), (module.v, cells))
    q, k, v = (layer(t).unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for layer, t in projections)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.contiguous())
    return module.proj(out.transpose(1, 2).flatten(2))


def projection_inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(DIM, 2 * N_CHANNELS) / (2 * N_CHANNELS) ** 0.5
    return torch.randn(1, N_CHANNELS, CONTEXT_SIDE, CONTEXT_SIDE), torch.randn(1, N_CHANNELS, SIDE, SIDE), weight


def project_ours(context: Tensor, windows: Tensor, weight: Tensor) -> Tensor:
    first, second = weight[:, :, None, None].chunk(2, dim=1)
    return resize_antialiased(F.conv2d(context, first), (SIDE, SIDE)) + F.conv2d(windows, second)


def project_literal(context: Tensor, windows: Tensor, weight: Tensor) -> Tensor:
    joined = torch.cat([resize_antialiased(context, (SIDE, SIDE)), windows], dim=1)
    return F.conv2d(joined, weight[:, :, None, None])


PARTS: dict[str, tuple[Callable[..., tuple[object, ...]], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "attention": (attention_inputs, attention_ours, attention_literal),
    "projection": (projection_inputs, project_ours, project_literal),
}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="where others share the machine; with --threads 1")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        part, way = args.case.split("/")
        make, *ways = PARTS[part]
        inputs = make()
        before = peak_mb()
        ways[way == "literal"](*inputs)
        print(peak_mb() - before)
        return
    # First, because a new process counts the peak of the one that starts it as its own.
    names = [f"{part}/{way}" for part in PARTS for way in ("ours", "literal")]
    command = [sys.executable, __file__, "--threads", str(args.threads), "--case"]
    added = {n: float(subprocess.run([*command, n], check=True, capture_output=True, text=True).stdout) for n in names}
    clock = time.process_time if args.cpu_time else time.perf_counter
    kind = "processor seconds" if args.cpu_time else "seconds"
    print(f"torch {torch.__version__}, {args.threads} threads, {kind}, {args.rounds} rounds\n")
    print("| part | ours | literal | ratio | MB ours | MB literal | ratio | difference |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for part, (make, ours, literal) in PARTS.items():
        inputs = make()
        seconds: tuple[list[float], list[float]] = ([], [])
        difference = float((ours(*inputs) - literal(*inputs)).abs().max())
        for _ in range(args.rounds):
            for values, way in zip(seconds, (ours, literal), strict=True):
                start = clock()
                way(*inputs)
                values.append(clock() - start)
        a, b = (statistics.median(values) for values in seconds)
        ratio = statistics.median(x / y for x, y in zip(*seconds, strict=True))
        mb, mb_literal = added[f"{part}/ours"], added[f"{part}/literal"]
        print(
            f"| {part} | {a:.2f} | {b:.2f} | {ratio:.2f} | {mb:.0f} | {mb_literal:.0f} | {mb / mb_literal:.2f} | "
            f"{difference:.0e} |"
        )


if __name__ == "__main__":
    main()
