"""From a folder of images to files of predictions: the command that the predict modules of all dense tasks share."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from dinov3.data.datasets.listing import list_images
from dinov3.data.images import MAX_IMAGE_PIXELS, BadImageError, ImageReading, read_image_file
from dinov3.distributed import runtime
from dinov3.eval.command.config import read_config
from dinov3.hub.command_line import parse_dtype, positive
from dinov3.utils.command_line import ArgumentParser
from dinov3.utils.files import atomic_write

#: Arrays (written as .npy), pictures (.png) and texts of one image by the endings of their file names, in order of
#: writing.
Files = Mapping[str, np.ndarray[Any, Any] | Image.Image | str]

Config = TypeVar("Config")


def make_parser(module: str, description: str | None, epilog: str) -> argparse.ArgumentParser:
    """Make the parser of `python -m dinov3.eval.<module>`, with the options that predict commands share."""
    parser = ArgumentParser(
        prog=f"python -m dinov3.eval.{module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--images", type=Path, required=True, help="an image, or a folder that is searched at any depth"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the results, which mirrors the folder")
    parser.add_argument("--backbone-weights", help="file of the backbone's weights, if not where training had them")
    parser.add_argument("--size", type=positive, help="short side that images are resized to, pixels")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--dtype", type=parse_dtype, help="float32 or bfloat16 (default: as trained)")
    parser.add_argument(
        "--on-bad-image",
        choices=("skip", "raise"),
        default="skip",
        help="what to do if an image cannot be read (default: skip)",
    )
    parser.add_argument(
        "--max-image-pixels",
        type=positive,
        default=MAX_IMAGE_PIXELS,
        metavar="N",
        help=f"larger images cannot be read (default: {MAX_IMAGE_PIXELS})",
    )
    parser.add_argument("--overwrite", action="store_true", help="overwrite existing predictions")
    return parser


def predict_images(
    arguments: argparse.Namespace, load: Callable[[], Callable[[Image.Image], Files]], *, what: str, last_suffix: str
) -> int:
    """Write the predictions of images; the rest of a predict command after its arguments were parsed.

    A command that was stopped continues where it was when it is started again: images that have their last file are
    skipped.

    Args:
        arguments: from a parser made by `make_parser`.
        load: loads a model and returns what predicts the files of an RGB image.
        what: is predicted, for the last line on the terminal.
        last_suffix: ending of the name of the file of an image that is written last.

    Returns:
        0.

    Raises:
        FileNotFoundError: there are no images.
        ValueError: an image cannot be read, with `--on-bad-image raise`; or none of them can.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with runtime.preferring(None if arguments.device == "auto" else arguments.device):
        predict = load()
        images = find_images(arguments.images)
        pending = {
            file: stem
            for file, stem in images.items()
            if arguments.overwrite or not Path(f"{arguments.out / stem}{last_suffix}").exists()
        }
        if len(pending) < len(images):
            n_done = len(images) - len(pending)
            print(f"{n_done} of {len(images)} images have predictions: skipped (--overwrite predicts them again)")
        n_bad = 0
        reading = ImageReading(max_image_pixels=arguments.max_image_pixels)
        for file, stem in tqdm(pending.items(), "predicting", unit="image"):
            try:
                image = read_image_file(file, reading)
            except BadImageError as error:
                if arguments.on_bad_image == "raise":
                    raise ValueError(str(error)) from error
                tqdm.write(f"{error}: skipped", file=sys.stderr)
                n_bad += 1
                continue
            for suffix, content in predict(image).items():
                with atomic_write(f"{arguments.out / stem}{suffix}") as target:
                    if isinstance(content, Image.Image):
                        content.save(target, format="PNG")
                    elif isinstance(content, str):
                        target.write(content.encode())
                    else:
                        np.save(target, content)
    if n_bad and n_bad == len(images):
        raise ValueError(f"--images {arguments.images}: none of {n_bad} images can be read")
    print(f"{what} of {len(pending) - n_bad} images in {arguments.out}")
    return 0


def find_images(images: Path) -> dict[Path, Path]:
    """Return the path of its results, relative and without ending, for an image or for all images in a folder.

    Raises:
        FileNotFoundError: the path does not exist, or there are no images.
    """
    images = images.expanduser()
    if images.is_file():
        return {images: Path(images.stem)}
    if not images.is_dir():
        raise FileNotFoundError(f"--images {images}: there is no such file or directory")
    found = [Path(name) for name in list_images(images).images]
    if not found:
        raise FileNotFoundError(f"--images {images}: there are no images in it, at any depth")
    # If there are a.jpg and a.png side by side, both keep their endings.
    counts = Counter(path.with_suffix("") for path in found)
    return {images / path: stem if counts[stem := path.with_suffix("")] == 1 else path for path in found}


def read_training(
    weights: str | os.PathLike[str],
    config_filename: str,
    config_class: type[Config],
    *,
    preferred: tuple[str, ...],
    backbone_weights: str | None = None,
) -> Config:
    """Read the settings of the training of a head, and change them so that this head is loaded.

    Args:
        weights: the file of the head, or the output directory of its training.
        config_filename: the file beside it in which the training wrote its settings.
        config_class: of the settings, with `load_from` and `model`.
        preferred: names of files in the directory; the first one that exists is taken.
        backbone_weights: of the backbone, if they are not where the training had them.

    Raises:
        FileNotFoundError: one of the files does not exist.
        ConfigError: the settings are not those of this task.
    """
    file = Path(weights).expanduser()
    if file.is_dir():
        files = [file / name for name in preferred if (file / name).is_file()]
        if not files:
            raise FileNotFoundError(f"--weights {file}: there is no {' or '.join(preferred)} in this directory")
        file = files[0]
    if not file.is_file():
        raise FileNotFoundError(f"--weights {file}: there is no such file")
    config_file = file.parent / config_filename
    if not config_file.is_file():
        raise FileNotFoundError(
            f"--weights {file}: there is no {config_filename} beside it, in which training wrote the type of the head "
            "and its backbone"
        )
    config: Any = read_config(config_file, config_class)
    model = config.model
    if model is not None and backbone_weights is not None:
        model = dataclasses.replace(model, **{"weights" if model.dino_hub else "pretrained_weights": backbone_weights})
    return dataclasses.replace(config, load_from=str(file), model=model)


def with_evaluation_transforms(config: Config, **settings: Any) -> Config:
    """Return a copy of the settings of a run with others in `transforms.eval`."""
    transforms: Any = config.transforms  # type: ignore[attr-defined]
    transforms = dataclasses.replace(transforms, eval=dataclasses.replace(transforms.eval, **settings))
    return dataclasses.replace(config, transforms=transforms)  # type: ignore[type-var]
