"""Train a small ViT on real images on the CPU, measure what it learnt, and draw its features.

    python -m dinov3.demo [--output-dir DIR] [--images DIR] [--seed N] [--iterations N] [key=value ...]

Or, in a clone: make demo [DEMO_ARGS="..."].
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dinov3.demo.run import RECIPE, DemoOptions, run_demo
from dinov3.utils.command_line import ArgumentParser, run_command_line

DESCRIPTION = """\
Train a small ViT with DINO, iBOT and KoLeo on real images, on the CPU, in a few minutes:

  1. write the images: scanned digits, small faces, and tiles of photos, all from inside installed packages (nothing
     is downloaded), or those of your own folder
  2. classify held-out labelled images by k-NN with the randomly initialised network
  3. train it, with the same code and kind of recipe as any other training
  4. classify them again with the trained teacher
  5. draw loss curves, principal components of patch features, and similarity to a marked patch
"""
EPILOG = f"""\
The recipe is {RECIPE.name}, in dinov3/configs/train/. Existing results are used again: started twice, the demo
only measures and draws; after a kill it resumes from the last checkpoint; with other settings it trains again and
keeps the earlier run beside the new one.

examples:
  python -m dinov3.demo
  python -m dinov3.demo --iterations 40 --output-dir outputs/quick
  python -m dinov3.demo --images ~/Pictures/holiday --output-dir outputs/holiday
  python -m dinov3.demo optim.lr=0.002 student.drop_path_rate=0.1
"""


def parse_args(argv: list[str]) -> DemoOptions:
    """Parse the options of a command line.

    Raises:
        SystemExit: unknown flags or bare words; argparse prints the usage.
    """
    parser = ArgumentParser(
        prog="python -m dinov3.demo",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("outputs/demo"), metavar="DIR", help="default: outputs/demo"
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="train on your own images instead; with a folder per class, a quarter of each class is held out and "
        "classified by k-NN",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the training; default: 0")
    parser.add_argument(
        "--iterations", type=_positive, metavar="N", help="training steps, instead of those of the recipe"
    )
    parser.add_argument("options", nargs="*", metavar="key=value", help="settings of the training, e.g. optim.lr=0.002")
    args = parser.parse_intermixed_args(argv)
    for option in args.options:
        if "=" not in option:
            parser.error(f"{option!r} is neither a flag nor a key=value option")
    return DemoOptions(args.output_dir, args.images, args.seed, args.iterations, tuple(args.options))


def main(argv: list[str] | None = None) -> None:
    """Run the demo from the command line; None takes the arguments of the program."""
    run_demo(parse_args(sys.argv[1:] if argv is None else argv))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return value


if __name__ == "__main__":
    run_command_line(main)
