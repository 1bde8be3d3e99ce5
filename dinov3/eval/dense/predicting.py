"""From a folder of images to files of predictions: what the predict commands share.

Notable:
- Each image's files are written whole, pictures last; a command that was stopped goes on where it was when it is
  started again, because images that have their picture are skipped.
- An image that cannot be read is reported and skipped, or ends the command with `--on-bad-image raise`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dinov3.data.datasets.decoders import ImageDataDecoder
from dinov3.data.datasets.listing import list_images
from dinov3.eval.command.model import ModelConfig
from dinov3.hub.command_line import parse_dtype, positive, written_whole

ON_BAD_IMAGE = ("skip", "raise")

#: Of one image by the ending of their names: arrays (written as .npy) and pictures (.png), in the order of writing.
Files = Mapping[str, np.ndarray[Any, Any] | Image.Image]


def make_parser(module: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of `python -m dinov3.eval.<module>`, with the options that predict commands share."""
    parser = argparse.ArgumentParser(
        prog=f"python -m dinov3.eval.{module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
        "--on-bad-image", choices=ON_BAD_IMAGE, default="skip", help="that cannot be read (default: skip)"
    )
    parser.add_argument("--overwrite", action="store_true", help="predict images anew that have their results")
    return parser


def find_images(images: Path) -> list[tuple[Path, Path]]:
    """(file, path of its results without ending) of an image, or of all images in a folder.

    Raises:
        FileNotFoundError: there is nothing, or no image.
    """
    images = images.expanduser()
    if images.is_file():
        return [(images, Path(images.stem))]
    if not images.is_dir():
        raise FileNotFoundError(f"--images {images}: there is no such file or directory")
    relative = [Path(name) for name in list_images(images).images]
    if not relative:
        raise FileNotFoundError(f"--images {images}: there is no image in it, at any depth")
    stems = [path.with_suffix("") for path in relative]
    # Where a.jpg and a.png lie side by side, both keep their endings.
    counts = Counter(stems)
    stems = [path if counts[stem] > 1 else stem for path, stem in zip(relative, stems, strict=True)]
    return [(images / path, stem) for path, stem in zip(relative, stems, strict=True)]


def predict_images(
    images: Path,
    out: Path,
    predict: Callable[[Image.Image], Files],
    *,
    done_suffix: str,
    on_bad_image: str,
    overwrite: bool,
) -> int:
    """Write the predictions of images.

    Args:
        images: an image, or a folder.
        out: directory of the results.
        predict: gives the files of an RGB image.
        done_suffix: ending of the name of the file that is written last.
        on_bad_image: `skip` or `raise`.
        overwrite: predict images anew that have their results.

    Returns:
        The number of images that were predicted.

    Raises:
        FileNotFoundError: there is no image.
        ValueError: an image cannot be read, with `raise`; or none of them can.
    """
    found = find_images(images)
    pending = [(file, stem) for file, stem in found if overwrite or not _named(out, stem, done_suffix).exists()]
    if len(pending) < len(found):
        print(f"{len(found) - len(pending)} of {len(found)} images have their results: skipped (--overwrite: anew)")
    bad = 0
    for file, stem in tqdm(pending, "predicting", unit="image"):
        try:
            image = ImageDataDecoder(file.read_bytes()).decode()
        except OSError as error:
            message = f"{file} cannot be read as an image: {error}"
            if on_bad_image == "raise":
                raise ValueError(message) from error
            tqdm.write(f"{message}: skipped", file=sys.stderr)
            bad += 1
            continue
        for suffix, content in predict(image).items():
            _write(_named(out, stem, suffix), content)
    if bad and bad == len(found):
        raise ValueError(f"--images {images}: none of {len(found)} images can be read")
    return len(pending) - bad


def find_head(weights: Path, config_filename: str, *, preferred: tuple[str, ...]) -> tuple[Path, Path]:
    """The file of a trained head and the configuration beside it.

    Args:
        weights: the file, or the output directory of its training.
        config_filename: what the training wrote.
        preferred: names of files in the directory, the first that is there is taken.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    weights = weights.expanduser()
    if weights.is_dir():
        files = [weights / name for name in preferred if (weights / name).is_file()]
        if not files:
            raise FileNotFoundError(f"--weights {weights}: there is no {' or '.join(preferred)} in this directory")
        weights = files[0]
    if not weights.is_file():
        raise FileNotFoundError(f"--weights {weights}: there is no such file")
    config = weights.parent / config_filename
    if not config.is_file():
        raise FileNotFoundError(
            f"--weights {weights}: there is no {config_filename} beside it, which says what head it is and on which "
            "backbone; training writes it"
        )
    return weights, config


def move_backbone(model: ModelConfig | None, weights: str | None) -> ModelConfig | None:
    """The backbone of a training, with its weights elsewhere if they are given."""
    if model is None or weights is None:
        return model
    return dataclasses.replace(model, **{"weights" if model.dino_hub else "pretrained_weights": weights})


def _named(out: Path, stem: Path, suffix: str) -> Path:
    return out / stem.parent / f"{stem.name}{suffix}"


def _write(path: Path, content: np.ndarray[Any, Any] | Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary, temporary.open("wb") as file:
        if isinstance(content, Image.Image):
            content.save(file, format="PNG")
        else:
            np.save(file, content)
