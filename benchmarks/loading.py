"""Time and memory of loading weights from a local file, each measurement in its own process.

    python benchmarks/loading.py vitl16 [--rounds 7] [--directory DIR]
    python benchmarks/loading.py vit7b16 [--directory DIR]
    python benchmarks/loading.py imports [--rounds 7]

`vitl16` (needs 2.5 GB of disk) interleaves the hub's load of a float32 ViT-L/16, from a PyTorch file and from
safetensors, read or mapped, with the floor, which reads the file with torch.load and assigns its tensors to a model on
the meta device without any check, and with the plain way: build, initialise, read, copy. `vit7b16` (needs 13.5 GB)
loads a bfloat16 ViT-7B/16 and runs one image of 224 px. The checkpoints, of random numbers, are made in DIR (by default
the directory for temporary files) and deleted afterwards. `imports` interleaves the import of `dinov3.hub.backbones`
with that of only `torch`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
Figures = dict[str, float]


def main() -> None:
    args = parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.directory, args.entry)))
    elif args.what == "imports":
        compare_imports(args.rounds)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that the checkpoint is deleted then, too.
        with tempfile.TemporaryDirectory(dir=args.directory, prefix="dinov3-loading-") as directory:
            (compare_vitl16 if args.what == "vitl16" else load_vit7b16)(Path(directory), args.rounds)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["vitl16", "vit7b16", "imports"])
    parser.add_argument("--rounds", type=int, default=7, help="fresh processes of each kind")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints go")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--entry", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare_vitl16(directory: Path, rounds: int) -> None:
    """Print the table of the ways to load a ViT-L/16."""
    import torch

    from dinov3.utils.weight_files import write_safetensors

    path = make_checkpoint("dinov3_vitl16", directory, torch.float32)
    safetensors = path.with_suffix(".safetensors")
    write_safetensors(safetensors, torch.load(path, mmap=True), {})
    ways: dict[str, list[Figures]] = {way: [] for way in WAYS}
    for index in range(rounds + 1):
        for way, figures in ways.items():
            file = safetensors if "safetensors" in way else path
            measured = in_process(way, file, "dinov3_vitl16")
            if index > 0:  # The first round reads the files into the cache of the operating system.
                figures.append(measured)
    size = path.stat().st_size
    print(f"ViT-L/16, float32, file of {size / 1e6:.0f} MB, torch {torch.__version__}, medians of {rounds} rounds\n")
    print("| | load, s | ratio | CPU, s | first forward, s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for way, figures in ways.items():
        load = median(figures, "load_s")
        ratio = statistics.median(a["load_s"] / b["load_s"] for a, b in zip(figures, ways["floor"], strict=True))
        row = [f"{load:.3f}", f"{ratio:.2f}", f"{median(figures, 'load_cpu_s'):.3f}"]
        row += [f"{median(figures, 'forward_s'):.3f}"]
        print(f"| {way} | {' | '.join(row)} |")
    print("\n| | load: growth | whole process | first forward: growth | whole process | of it not mapped from a file |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    keys = [f"{step}_{kind}_bytes" for step in ("load", "forward") for kind in ("peak", "total_peak")]
    for way, figures in ways.items():
        row = [f"{median(figures, key) / size:.2f}" for key in (*keys, "forward_anonymous_bytes")]
        print(f"| {way} | {' | '.join(row)} |")
    baseline = statistics.median(f["before_bytes"] for figures in ways.values() for f in figures)
    print(
        "\nPeak resident memory over the size of the file. Growth is over that of a process that has imported torch "
        f"and dinov3.hub.backbones, {baseline / 1e6:.0f} MB ({baseline / size:.2f} of the file)."
    )


def load_vit7b16(directory: Path, rounds: int) -> None:
    """Print what loading a ViT-7B/16 in bfloat16 and one forward take."""
    import torch

    path = make_checkpoint("dinov3_vit7b16", directory, torch.bfloat16)
    figures = in_process("hub", path, "dinov3_vit7b16")
    print(f"ViT-7B/16, bfloat16, file of {path.stat().st_size / 1e9:.2f} GB, torch {torch.__version__}\n")
    print("| | seconds | peak resident memory, GB | not mapped from the file, at the end, GB |")
    print("| --- | ---: | ---: | ---: |")
    for step in ("load", "forward"):
        peak, own = (figures[f"{step}_{kind}_bytes"] / 1e9 for kind in ("total_peak", "anonymous"))
        print(f"| {step} | {figures[f'{step}_s']:.2f} | {peak:.2f} | {own:.2f} |")


def compare_imports(rounds: int) -> None:
    """Print the ratio of the import times."""
    seconds: dict[str, list[float]] = {"torch": [], "dinov3.hub.backbones": []}
    for index in range(rounds + 1):
        for module, durations in seconds.items():
            code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
            result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=True)
            if index > 0:
                durations.append(float(result.stdout))
    alone, ours = seconds.values()
    ratio = statistics.median(a / b for a, b in zip(ours, alone, strict=True))
    print(f"| import | seconds, median of {rounds} | ratio |\n| --- | ---: | ---: |")
    for module, durations in seconds.items():
        print(f"| {module} | {statistics.median(durations):.3f} | {ratio if durations is ours else 1:.2f} |")


def make_checkpoint(entry: str, directory: Path, dtype: Any) -> Path:
    """A file of random weights; making it takes little memory, because all its tensors are the same random numbers."""
    import torch

    from dinov3.hub import backbones

    shapes = getattr(backbones, entry)(pretrained=False, device="meta").state_dict()
    size = sum(tensor.numel() for tensor in shapes.values()) * dtype.itemsize
    free = shutil.disk_usage(directory).free
    if free < 1.05 * size:
        sys.exit(
            f"{entry} needs {size / 1e9:.1f} GB in {directory}, but only {free / 1e9:.1f} GB are free: --directory"
        )
    largest = max(tensor.numel() for tensor in shapes.values())
    numbers = directory / "numbers"
    random = (0.02 * torch.randn(largest, generator=torch.Generator().manual_seed(0))).to(dtype)
    random.view(torch.uint8).numpy().tofile(numbers)
    # Mapped once for each entry, so that each is saved as a storage of its own.
    state = {
        name: torch.from_file(str(numbers), shared=False, size=tensor.numel(), dtype=dtype).view(tensor.shape)
        for name, tensor in shapes.items()
    }
    state["rope_embed.periods"] = state["rope_embed.periods"].abs() + 1
    path = directory / f"{entry}.pth"
    torch.save(state, path)
    numbers.unlink()
    return path


def in_process(way: str, path: Path, entry: str) -> Figures:
    """What `measure` returns in a fresh process."""
    command = [sys.executable, __file__, "vitl16", "--measure", way, "--directory", str(path), "--entry", entry]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return json.loads(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)


def measure(way: str, path: Path, entry: str) -> Figures:
    """Load once and run one image of 224 px; seconds and bytes of both."""
    import torch

    from dinov3.hub import backbones

    dtype = torch.bfloat16 if entry == "dinov3_vit7b16" else torch.float32
    load = WAYS[way]
    before = memory("VmRSS")
    figures: Figures = {"before_bytes": before}
    cpu, started = time.process_time(), time.perf_counter()
    model = load(backbones, entry, path, dtype)
    figures |= {"load_s": time.perf_counter() - started, "load_cpu_s": time.process_time() - cpu}
    figures |= memory_figures("load", before)
    started = time.perf_counter()
    with torch.inference_mode():
        features = model(torch.zeros(1, 3, 224, 224, dtype=dtype))
    figures |= {"forward_s": time.perf_counter() - started} | memory_figures("forward", before)
    assert features.isfinite().all()
    return figures


def load_by_hub(backbones: Any, entry: str, path: Path, dtype: Any) -> Any:
    return getattr(backbones, entry)(weights=path, dtype=dtype)


def map_by_hub(backbones: Any, entry: str, path: Path, dtype: Any) -> Any:
    return getattr(backbones, entry)(weights=path, dtype=dtype, mmap=True)


def load_by_floor(backbones: Any, entry: str, path: Path, dtype: Any) -> Any:
    import torch

    from dinov3.hub.architectures import PUBLISHED
    from dinov3.models.vision_transformer import DinoVisionTransformer

    with torch.device("meta"):
        model = DinoVisionTransformer(**PUBLISHED[entry].options())
    model.load_state_dict(torch.load(path, mmap=False, weights_only=True), assign=True)
    return model.eval()


def load_plainly(backbones: Any, entry: str, path: Path, dtype: Any) -> Any:
    import torch

    model = getattr(backbones, entry)(pretrained=False)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


WAYS = {
    "floor": load_by_floor,
    "hub": load_by_hub,
    "hub, safetensors": load_by_hub,
    "hub, mapped": map_by_hub,
    "hub, safetensors, mapped": map_by_hub,
    "plain": load_plainly,
}


def memory_figures(step: str, before: float) -> Figures:
    """Peaks of the resident set since the process began, and what of it is anonymous now."""
    peak = memory("VmHWM")
    return {
        f"{step}_peak_bytes": peak - before,
        f"{step}_total_peak_bytes": peak,
        f"{step}_anonymous_bytes": memory("RssAnon"),
    }


def memory(key: str) -> float:
    """A size in bytes from /proc/self/status, which only Linux has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def median(figures: list[Figures], key: str) -> float:
    return statistics.median(entry[key] for entry in figures)


if __name__ == "__main__":
    main()
