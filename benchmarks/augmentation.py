"""Images per second of the pretraining augmentation on one core, against a plain composition of torchvision on Pillow.

    python benchmarks/augmentation.py [--rounds 60] [--size 500x375] [--size 1024x768] [--recipe 256,112,8]

Each round augments one image with every variant, one after the other, so that a busy machine slows all alike; medians
are reported. Images are smooth random ones, first decoded already, then as the bytes of a JPEG file (quality 90), whose
decoding is part of the time. The plain composition draws from the same distribution: `RandomResizedCrop`, flip, colour
jitter, grayscale, blur and solarisation on Pillow images, then normalised floats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from PIL import __version__ as pillow_version
from torchvision.transforms import v2

from dinov3.data.augmentations import DataAugmentationDINO
from dinov3.data.images import read_pixels
from dinov3.data.transforms import make_base_transform

GLOBAL_SCALE, LOCAL_SCALE = (0.32, 1.0), (0.05, 0.32)
BASELINE = "torchvision on Pillow, float32"


class PlainAugmentation:
    """The same views, composed of torchvision's transforms on Pillow images."""

    def __init__(self, global_size: int, local_size: int, local_number: int) -> None:
        jitter = [
            v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
        ]
        finish = [v2.ToImage(), make_base_transform()]

        def view(size: int, scale: tuple[float, float], *distortions: v2.Transform) -> v2.Compose:
            cut = v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC)
            return v2.Compose([cut, v2.RandomHorizontalFlip(), *jitter, *distortions, *finish])

        def blur(probability: float) -> v2.Transform:
            return v2.RandomApply([v2.GaussianBlur(9, sigma=(0.1, 2.0))], p=probability)

        self.views = [
            view(global_size, GLOBAL_SCALE),
            view(global_size, GLOBAL_SCALE, blur(0.9), v2.RandomSolarize(threshold=128, p=0.2)),
            *[view(local_size, LOCAL_SCALE, blur(0.5))] * local_number,
        ]

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        return [view(image) for view in self.views]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {pillow_version}, one thread\n")
    for kind, build in (("image", build_variants), ("JPEG file", build_variants_with_decoding)):
        print(f"| {kind} | views | augmentation | ms per image | images/s | ratio |")
        print("| --- | --- | --- | ---: | ---: | ---: |")
        for global_size, local_size, local_number in args.recipe:
            variants = build(global_size, local_size, local_number)
            for width, height in args.size:
                image = smooth_image(width, height)
                seconds = measure(variants, image if kind == "image" else encode(image), args.rounds)
                for name, value in seconds.items():
                    views = f"2 x {global_size} + {local_number} x {local_size}"
                    cells = [f"{width} x {height}", views, name, f"{value * 1e3:.1f}", f"{1 / value:.0f}"]
                    print(f"| {' | '.join(cells)} | {seconds[BASELINE] / value:.1f} |")
        print()


def parse_args() -> argparse.Namespace:
    def numbers(separator: str) -> Callable[[str], tuple[int, ...]]:
        return lambda text: tuple(int(part) for part in text.split(separator))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--size", type=numbers("x"), action="append", help="width x height of the image")
    parser.add_argument(
        "--recipe", type=numbers(","), action="append", help="global size,local size,number of local views"
    )
    args = parser.parse_args()
    args.size = args.size or [(500, 375), (1600, 1200)]
    args.recipe = args.recipe or [(224, 96, 8), (256, 112, 8)]
    return args


def build_variants(global_size: int, local_size: int, local_number: int) -> dict[str, Callable[[Image.Image], Any]]:
    ours = {
        f"dinov3, {'uint8' if output_uint8 else 'float32'}": DataAugmentationDINO(
            GLOBAL_SCALE, LOCAL_SCALE, local_number, global_size, local_size, output_uint8=output_uint8
        )
        for output_uint8 in (False, True)
    }
    return {BASELINE: PlainAugmentation(global_size, local_size, local_number), **ours}


def build_variants_with_decoding(
    global_size: int, local_size: int, local_number: int
) -> dict[str, Callable[[bytes], Any]]:
    plain = PlainAugmentation(global_size, local_size, local_number)
    ours = DataAugmentationDINO(GLOBAL_SCALE, LOCAL_SCALE, local_number, global_size, local_size, output_uint8=True)
    return {
        BASELINE: lambda data: plain(decode_with_pillow(data)),
        "dinov3, uint8, decoded by Pillow": lambda data: ours(decode_with_pillow(data)),
        "dinov3, uint8": lambda data: ours(read_pixels(data)),
    }


def decode_with_pillow(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data)).convert("RGB")


def encode(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def smooth_image(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def measure(variants: dict[str, Callable[[Any], Any]], image: Any, rounds: int) -> dict[str, float]:
    """Median seconds of each variant, measured in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(rounds + 3):
        for name, augment in variants.items():
            torch.manual_seed(round_number)  # our two variants cut alike
            started = time.perf_counter()
            augment(image)
            if round_number >= 3:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
