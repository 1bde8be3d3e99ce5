"""Write the files that a dataset needs besides its images, once:

    python -m dinov3.data.datasets.dump ImageNet:root=DIR:extra=DIR

ImageNet and ImageNet22k have extra files, ADE20K listings, WebDataset an index per shard. Without `split=`, all splits
whose directories exist are written.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from dinov3.data.datasets.ade20k import ADE20K
from dinov3.data.datasets.image_net import ImageNet
from dinov3.data.datasets.image_net_22k import ImageNet22k
from dinov3.data.datasets.strings import COMMON_KEYS, DatasetStringError, parse_dataset_string
from dinov3.data.datasets.web_dataset import WebDataset
from dinov3.utils.command_line import ArgumentParser, run_command_line

REQUIRED_KEYS = {
    "ADE20K": ("root",),
    "ImageNet": ("root", "extra"),
    "ImageNet22k": ("root", "extra"),
    "WebDataset": ("urls",),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the files of the dataset that the command line names; None takes the arguments of the program."""
    parser = ArgumentParser(
        prog="python -m dinov3.data.datasets.dump",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", help="for example ImageNet:root=/data/imagenet:extra=/data/imagenet-extra")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dump(parser.parse_args(argv).dataset)


def dump(dataset_str: str) -> None:
    """Write the extra files, listings or indices of the dataset that a string names.

    Raises:
        DatasetStringError: the string does not name exactly one dataset that has such files, or lacks a key.
        FileNotFoundError: no split is present, or a file is missing.
    """
    parsed = parse_dataset_string(dataset_str)
    if len(parsed) != 1 or parsed[0].name not in REQUIRED_KEYS:
        raise DatasetStringError(
            f"dataset string {dataset_str!r}: only {', '.join(REQUIRED_KEYS)} have extra files to write"
        )
    name, kwargs = parsed[0].name, {key: value for key, value in parsed[0].kwargs.items() if key not in COMMON_KEYS}
    for key in REQUIRED_KEYS[name]:
        if not kwargs.get(key):
            raise DatasetStringError(f"dataset string {dataset_str!r}: give {key}=DIRECTORY")
    match name:
        case "ADE20K":
            images = Path(kwargs["root"]).expanduser() / "images"
            for split in _splits(kwargs, ADE20K.Split, images, lambda split: split.dirname):
                ADE20K.dump_listing(split, kwargs["root"])
        case "ImageNet":
            root = Path(kwargs["root"]).expanduser()
            for split in _splits(kwargs, ImageNet.Split, root, lambda split: split.value):
                ImageNet(split=split, root=kwargs["root"], extra=kwargs["extra"]).dump_extra()
        case "ImageNet22k":
            ImageNet22k(root=kwargs["root"], extra=kwargs["extra"]).dump_extra()
        case "WebDataset":
            dataset = WebDataset(**kwargs)
            logging.getLogger("dinov3").info("indexed %d samples in %d shards", len(dataset), len(dataset.shards))


def _splits(kwargs: dict[str, Any], splits: type[Enum], root: Path, dirname: Callable[[Any], str]) -> list[Any]:
    found = [kwargs["split"]] if "split" in kwargs else [split for split in splits if (root / dirname(split)).is_dir()]
    if not found:
        raise FileNotFoundError(f"{root} has none of the directories {', '.join(map(dirname, splits))}")
    return found


if __name__ == "__main__":
    run_command_line(main)
