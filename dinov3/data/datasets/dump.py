"""Write the extra files of a dataset: `python -m dinov3.data.datasets.dump ImageNet:root=DIR:extra=DIR`.

Without `split=` all splits whose directories exist are written.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dinov3.data.datasets.image_net import ImageNet
from dinov3.data.datasets.strings import DatasetStringError, parse_dataset_string


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dinov3.data.datasets.dump", description=__doc__)
    parser.add_argument("dataset", help="for example ImageNet:root=/data/imagenet:extra=/data/imagenet-extra")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        dump(parser.parse_args(argv).dataset)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def dump(dataset_str: str) -> list[ImageNet]:
    """Write the extra files of the splits that a dataset string names, or of all that are present.

    Raises:
        DatasetStringError: the string names something else than one ImageNet with `root` and `extra`.
        FileNotFoundError: no split is present, or a file is missing.
    """
    parsed = parse_dataset_string(dataset_str)
    if len(parsed) != 1 or parsed[0].name != "ImageNet":
        raise DatasetStringError(f"dataset string {dataset_str!r}: only ImageNet has extra files to write")
    kwargs = parsed[0].kwargs
    for key in ("root", "extra"):
        if not kwargs.get(key):
            raise DatasetStringError(f"dataset string {dataset_str!r}: give {key}=DIRECTORY")
    root = Path(kwargs["root"]).expanduser()
    splits = [kwargs["split"]] if "split" in kwargs else [s for s in ImageNet.Split if (root / s.value).is_dir()]
    if not splits:
        names = ", ".join(split.value for split in ImageNet.Split)
        raise FileNotFoundError(f"{root} has none of the directories {names}")
    datasets = [ImageNet(split=split, root=kwargs["root"], extra=kwargs["extra"]) for split in splits]
    for dataset in datasets:
        dataset.dump_extra()
    return datasets


if __name__ == "__main__":
    sys.exit(main())
