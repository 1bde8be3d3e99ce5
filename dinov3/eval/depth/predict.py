"""Depth of every image in a folder: raw metres, and pictures with a scale."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinov3.distributed import runtime
from dinov3.eval.dense.checkpoints import BEST_NAME, FINAL_NAME
from dinov3.eval.dense.command_line import read_config
from dinov3.eval.dense.pictures import depth_picture
from dinov3.eval.dense.predicting import Files, find_head, make_parser, predict_images
from dinov3.eval.depth.config import HUB_DEPTHERS, DepthConfig, make_depth_eval_transforms_from_config
from dinov3.eval.depth.run import CONFIG_FILENAME, load_depther
from dinov3.heads.depther import Depther
from dinov3.utils.command_line import run_command_line

PICTURE, ARRAY = "_depth.png", "_depth.npy"
#: Short side that a released model was evaluated at; the other takes images as they are.
HUB_SIZES = {"dinov3_vit7b16_dd": 768}

EPILOG = f"""\
For every image NAME of the folder, OUT gets
  NAME{ARRAY}    float32 [height, width] of the image, metres
  NAME{PICTURE}    the image, its depth in colours, and the scale

examples:
  python -m dinov3.eval.depth.predict --images photos --weights outputs/depth --out depths
  python -m dinov3.eval.depth.predict --images tiles --model dinov3_vitl16_chmv2 --weights HEAD.pth \\
      --backbone-weights BACKBONE.pth --out heights
"""


class DepthPredictor:
    """A depth model with the preprocessing of its evaluation.

    Args:
        config: of the run: `transforms`, `eval.use_tta` is not looked at.
        depther: the model, in evaluation mode.
    """

    def __init__(self, config: DepthConfig, depther: Depther) -> None:
        # A picture is predicted whole, border and all.
        evaluation = dataclasses.replace(config.transforms.eval, fixed_crop="FULL")
        config = dataclasses.replace(config, transforms=dataclasses.replace(config.transforms, eval=evaluation))
        self._transforms = make_depth_eval_transforms_from_config(config, in_metres=True)
        self._depther = depther

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """An RGB image to float32 [height, width] of it, metres."""
        no_depth = np.zeros((image.height, image.width), dtype=np.float32)
        (pixels, *_), _ = self._transforms(image, no_depth)
        depth = self._depther.predict(pixels[None].to(runtime.device()), rescale_to=(image.height, image.width))
        return depth[0, 0].float().cpu().numpy()


def load_predictor(arguments: argparse.Namespace) -> DepthPredictor:
    """The model that the command line names.

    Raises:
        ValueError, FileNotFoundError: it names none, or weights that are not its.
    """
    if arguments.model:
        config = DepthConfig(
            load_from=arguments.model, head_weights=arguments.weights, backbone_weights=arguments.backbone_weights
        )
        config.transforms.eval.img_size = HUB_SIZES.get(arguments.model)
    elif arguments.weights:
        weights, config_file = find_head(Path(arguments.weights), CONFIG_FILENAME, preferred=(FINAL_NAME, BEST_NAME))
        config = read_config(config_file, DepthConfig)
        config.load_from = str(weights)
        if config.model is not None and arguments.backbone_weights:
            is_hub_model = bool(config.model.dino_hub)
            setattr(config.model, "weights" if is_hub_model else "pretrained_weights", arguments.backbone_weights)
    else:
        raise ValueError(f"no model: give --weights of a trained head, or --model {' or '.join(HUB_DEPTHERS)}")
    if arguments.size:
        config.transforms.eval.img_size = arguments.size
    depther, dtype, description = load_depther(config)
    if arguments.dtype:
        depther.autocast_dtype = dtype = arguments.dtype
    print(f"{description}, run in {dtype} on {runtime.device()}")
    return DepthPredictor(config, depther)


def main(argv: Sequence[str] | None = None) -> int:
    """Predict from the command line.

    Args:
        argv: arguments after the program's name; None takes them from the command line.

    Returns:
        0.
    """
    parser = make_parser("depth.predict", __doc__ or "", EPILOG)
    parser.add_argument("--weights", help="a trained head, or the output directory of its training; or of --model")
    parser.add_argument("--model", choices=HUB_DEPTHERS, help="a released model; without --weights, the published ones")
    parser.add_argument(
        "--range",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="metres of the colours' ends (default: of each image)",
    )
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    with runtime.preferring(None if arguments.device == "auto" else arguments.device):
        predictor = load_predictor(arguments)

        def predict(image: Image.Image) -> Files:
            depth = predictor(image)
            limits = tuple(arguments.range) if arguments.range else None
            return {ARRAY: depth, PICTURE: depth_picture(depth, image=image, limits=limits)}

        n_images = predict_images(
            arguments.images,
            arguments.out,
            predict,
            done_suffix=PICTURE,
            on_bad_image=arguments.on_bad_image,
            overwrite=arguments.overwrite,
        )
    print(f"depth of {n_images} images in {arguments.out}")
    return 0


if __name__ == "__main__":
    run_command_line(main)
