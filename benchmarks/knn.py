"""The core of a k-NN evaluation, from features to class scores, on the CPU.

    python benchmarks/knn.py [--rows 20000] [--queries 5000] [--dim 384] [--classes 100 1000] [--rounds 3] ...
    python benchmarks/knn.py --memory

Features are noisy copies of one centre per class, normalised. Three ways to the scores for k = 10, 20, 100, 200: ours
(`KnnModule`), a one-hot vote (batches of 256, all similarities, one-hot labels times weights, their sums), and faiss's
flat index with the vote of `KnnModule` (the index is built each time, which only copies). faiss is a peer, not a
dependency: `pip install faiss-cpu` first. Rounds interleave the three; ratios are medians of the rounds' own ratios.
With `--memory`: what `KnnModule` adds at its peak to the memory of features and queries, in the blocks that an
evaluation works in, each case in a process of its own.
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

import faiss
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov3.eval.classification import neighbours
from dinov3.eval.classification.knn_module import KnnModule

KS, T = [10, 20, 100, 200], 0.07
MEMORY_CASES = [(5000, 100), (5000, 1000), (20_000, 1000), (5000, 21_841)]
Scores = dict[int, Tensor]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    if args.case:
        print(measure_memory(*args.case))
    elif args.memory:
        report_memory()
    else:
        print(f"torch {torch.__version__}, faiss {faiss.__version__}, {args.threads} threads, {args.rounds} rounds")
        for n_classes in args.classes:
            compare(args, n_classes)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--separation", type=float, default=0.25, help="length of centres, relative to the noise")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="where others share the machine; with --threads 1")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--case", type=int, nargs=2, metavar=("QUERIES", "CLASSES"), help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args: argparse.Namespace, n_classes: int) -> None:
    clock = time.process_time if args.cpu_time else time.perf_counter
    train, labels = make_rows(args.rows, n_classes, args, seed=0)
    test, targets = make_rows(args.queries, n_classes, args, seed=1)
    ways: dict[str, Callable[[], Scores]] = {
        "ours": lambda: by_module(train, labels, test, n_classes),
        "one-hot vote": lambda: by_one_hot(train, labels, test, n_classes),
        "faiss flat index": lambda: by_flat_index(train, labels, test, n_classes),
    }
    for way in (by_module, by_flat_index):
        way(train[:500], labels[:500], test[:50], n_classes)  # what is loaded at the first call
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, Scores] = {}
    order = list(ways)
    for _ in range(args.rounds):
        for name in order:
            before = clock()
            scores[name] = ways[name]()
            seconds[name].append(clock() - before)
        order = order[1:] + order[:1]
    accuracy = 100 * float((scores["ours"][10].argmax(dim=1) == targets).double().mean())
    print(f"\n{args.rows} and {args.queries} x {args.dim}, {n_classes} classes, top-1 at k = 10: {accuracy:.2f}\n")
    report(seconds, scores)


def make_rows(n: int, n_classes: int, args: argparse.Namespace, *, seed: int) -> tuple[Tensor, Tensor]:
    """Normalised features [n, dim] and labels [n]."""
    shared, own = (torch.Generator().manual_seed(number) for number in (1000, seed))
    labels = torch.arange(n) % n_classes
    centres = args.separation * torch.randn(n_classes, args.dim, generator=shared)
    return F.normalize(centres[labels] + torch.randn(n, args.dim, generator=own), dim=1), labels


@torch.no_grad()
def by_one_hot(train: Tensor, labels: Tensor, test: Tensor, n_classes: int) -> Scores:
    parts: dict[int, list[Tensor]] = {k: [] for k in KS}
    for queries in test.split(256):
        similarities, rows = (queries @ train.T).topk(KS[-1])
        weights = (similarities / T).softmax(dim=1)
        votes = F.one_hot(labels[rows], n_classes) * weights[:, :, None]
        for k in KS:
            parts[k].append(votes[:, :k].sum(dim=1))
    return {k: torch.cat(scores) for k, scores in parts.items()}


def by_module(train: Tensor, labels: Tensor, test: Tensor, n_classes: int) -> Scores:
    module = KnnModule(train_features=train, train_labels=labels, device="cpu", ks=KS, T=T, num_classes=n_classes)
    return module(test)


def by_flat_index(train: Tensor, labels: Tensor, test: Tensor, n_classes: int) -> Scores:
    index = faiss.IndexFlatIP(train.shape[1])
    index.add(train.numpy())
    similarities, rows = (torch.from_numpy(array) for array in index.search(test.numpy(), KS[-1]))
    keys = neighbours.pack(similarities, rows)
    return neighbours.vote(keys, labels[:, None], ks=KS, temperature=T, num_classes=n_classes)


def report(seconds: dict[str, list[float]], scores: dict[str, Scores]) -> None:
    ours = scores["ours"]
    print("| | seconds | times ours | predictions other than ours | largest difference of scores |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["ours"], strict=True))
        others = sum(int((scores[name][k].argmax(dim=1) != ours[k].argmax(dim=1)).sum()) for k in KS)
        difference = max(float((scores[name][k] - ours[k]).abs().max()) for k in KS)
        print(f"| {name} | {statistics.median(values):.2f} | {ratio:.2f} | {others} | {difference:.0e} |")


def report_memory() -> None:
    print("| queries | classes | peak, MiB |")
    print("| ---: | ---: | ---: |")
    for n_queries, n_classes in MEMORY_CASES:
        command = [sys.executable, __file__, "--case", str(n_queries), str(n_classes)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"| {n_queries} | {n_classes} | {float(done.stdout):.0f} |", flush=True)


def measure_memory(n_queries: int, n_classes: int) -> float:
    train, labels = torch.randn(50_000, 64), torch.arange(50_000) % n_classes
    test = torch.randn(n_queries, 64)

    def search(n_rows: int, n: int) -> None:
        module = KnnModule(
            train_features=train[:n_rows],
            train_labels=labels[:n_rows],
            device="cpu",
            ks=[200],
            T=T,
            num_classes=n_classes,
        )
        for queries in test[:n].split(module.queries_per_block):  # as `eval_knn` does
            module(queries)[200].argmax(dim=1)

    search(300, 10)  # what is loaded at the first call
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    search(len(train), n_queries)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    main()
