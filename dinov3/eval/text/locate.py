"""Where in a photo texts are: a heat map of each, and a map of the nearest text of each pixel over the photo."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3.data import make_classification_eval_transform
from dinov3.data.images import BadImageError, read_image_file
from dinov3.distributed import runtime
from dinov3.eval.command.results import as_file_name
from dinov3.eval.dense.pictures import heat_picture, segmentation_picture
from dinov3.eval.text.config import TextModelConfig
from dinov3.eval.text.model import TextModel, load_text_model
from dinov3.eval.text.prompts import encode_classes, read_templates
from dinov3.eval.text.segmenter import PATCH_TOKENS, OpenVocabularySegmenter, patch_channels
from dinov3.hub.command_line import positive
from dinov3.layers.resizing import resize_bilinear
from dinov3.utils.command_line import ArgumentParser, run_command_line
from dinov3.utils.files import atomic_write

EPILOG = """\
Of photo.jpg, DIR gets
  photo_labels.png      the photo with the nearest text of each pixel in colours, and their names
  photo_0_a_cat.png     how near each pixel is to the first text (cosine), and so on

example:
  python -m dinov3.eval.text.locate --image photo.jpg --texts "a cat" "a cup" --out maps \\
      --weights HEAD.pth --backbone-weights BACKBONE.pth

The nearest text is always one of those given: add others, such as "a wall", for what else is in the photo.
"""
SHORT_SIDE = 512


@torch.no_grad()
def locate(
    text_model: TextModel,
    image: Image.Image,
    texts: Sequence[str],
    *,
    templates: Sequence[str] = ("{}",),
    short_side: int = SHORT_SIDE,
    patch_tokens: str = "head",
) -> Tensor:
    """Compare every pixel of a photo with texts.

    Args:
        text_model: on its device.
        image: RGB.
        texts: T of them, at least one.
        templates: sentences with `{}` for a text, whose vectors are averaged. Default: the text as it is.
        short_side: that the photo is resized to, pixels; smaller details need more.
        patch_tokens: see `OpenVocabularySegmenter`.

    Returns:
        Cosines [T, height, width], float32, on the CPU: those of the patches, bilinearly enlarged to the photo.

    Raises:
        ValueError: there are no texts, or one is empty.
    """
    if empty := [index for index, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"text {empty[0] + 1} of {len(texts)} is empty: say what to look for")
    channels = patch_channels(text_model.model)
    features = encode_classes(text_model.model, text_model.tokenizer, texts, templates, channels=channels)
    segmenter = OpenVocabularySegmenter(text_model.model, features, patch_tokens)
    pixels = make_classification_eval_transform(resize_size=short_side, crop_size=None)(image)
    with text_model.autocast():
        cosines = segmenter.cosines(pixels[None].to(text_model.device))
    return resize_bilinear(cosines, (image.height, image.width))[0].float().cpu()


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures from the command line.

    Args:
        argv: arguments after the program's name. Default: those of the command line.

    Returns:
        0.
    """
    arguments = _make_parser().parse_args(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = TextModelConfig(arguments.weights, arguments.backbone_weights, arguments.vocabulary)
    config.check()
    try:
        image = read_image_file(arguments.image.expanduser())  # before gigabytes are read
    except BadImageError as error:
        raise ValueError(f"--image {error}") from error
    templates = ["{}"] if arguments.templates is None else read_templates(arguments.templates)
    with runtime.preferring(None if arguments.device == "auto" else arguments.device):
        cosines = locate(
            load_text_model(config),
            image,
            arguments.texts,
            templates=templates,
            short_side=arguments.size,
            patch_tokens=arguments.patch_tokens,
        )
    for path, picture in _draw(cosines.numpy(), image, arguments.texts, arguments.out / arguments.image.stem):
        with atomic_write(path) as file:
            picture.save(file, format="PNG")
        print(f"written to {path}")
    return 0


def _draw(cosines: np.ndarray, image: Image.Image, texts: Sequence[str], stem: Path) -> list[tuple[str, Image.Image]]:
    pictures = [(f"{stem}_labels.png", segmentation_picture(cosines.argmax(axis=0), class_names=texts, image=image))]
    for number, (text, cosine) in enumerate(zip(texts, cosines, strict=True)):
        name = as_file_name(text.strip().replace(" ", "_"))
        pictures.append((f"{stem}_{number}_{name}.png", heat_picture(cosine, image=image, title=text)))
    return pictures


def _make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m dinov3.eval.text.locate",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", type=Path, required=True, help="the photo")
    parser.add_argument("--texts", nargs="+", required=True, metavar="TEXT", help="what to look for")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the pictures")
    parser.add_argument("--weights", help="file of the vision head and the text encoder (default: the published one)")
    parser.add_argument("--backbone-weights", help="file of the vision backbone (default: the published one)")
    parser.add_argument("--vocabulary", help="file of the tokenizer (default: the published one)")
    parser.add_argument(
        "--templates", help="imagenet, or a file with sentences, {} for the text (default: the text as it is)"
    )
    parser.add_argument(
        "--patch-tokens", choices=PATCH_TOKENS, default="head", help="what texts are compared with (default: head)"
    )
    parser.add_argument(
        "--size", type=positive, default=SHORT_SIDE, help=f"short side in pixels (default: {SHORT_SIDE})"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    return parser


if __name__ == "__main__":
    run_command_line(main)
