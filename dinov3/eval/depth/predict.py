"""Depth of every image in a folder: metres as arrays, and pictures with a scale."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinov3.distributed import runtime
from dinov3.eval.dense.pictures import depth_picture
from dinov3.eval.dense.predicting import Files, make_parser, predict_images, read_training, with_evaluation_transforms
from dinov3.eval.depth.config import HUB_DEPTHERS, DepthConfig
from dinov3.eval.depth.data import make_transforms
from dinov3.eval.depth.run import CONFIG_FILENAME, load_depther
from dinov3.eval.training.checkpoints import BEST_NAME, FINAL_NAME
from dinov3.heads.depth.depther import Depther
from dinov3.utils.command_line import run_command_line

logger = logging.getLogger("dinov3")

PICTURE, ARRAY = "_depth.png", "_depth.npy"
#: Short side at which a released model was evaluated; the other one takes images as they are.
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
    """A depth model with the preprocessing of its evaluation, but without crops and flips.

    Args:
        config: of the run.
        depther: the model, in evaluation mode.
    """

    def __init__(self, config: DepthConfig, depther: Depther) -> None:
        self._transforms = make_transforms(with_evaluation_transforms(config, fixed_crop="FULL"), "val", in_metres=True)
        self._depther = depther

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """Predict the depth of an RGB image: float32 [height, width], metres."""
        no_depth = np.zeros((image.height, image.width), dtype=np.float32)
        (pixels, *_), _ = self._transforms(image, no_depth)
        depth = self._depther.predict(pixels[None].to(runtime.device()), rescale_to=(image.height, image.width))
        return depth[0, 0].float().cpu().numpy()


def load_depth_predictor(
    weights: str | os.PathLike[str] | None = None,
    *,
    model: str | None = None,
    backbone_weights: str | None = None,
    size: int | None = None,
    dtype: torch.dtype | None = None,
) -> DepthPredictor:
    """Load a depth model that takes photos, on this process's device.

    Args:
        weights: a trained head, or the output directory of its training; or the head of `model`.
        model: `dinov3_vit7b16_dd` or `dinov3_vitl16_chmv2`, with the published weights if `weights` is not given.
        backbone_weights: of the backbone, if they are not where training had them, or not the published ones.
        size: short side that images are resized to, pixels. Default: that of the evaluation.
        dtype: the precision that the model runs in. Default: that of the training.

    Raises:
        ValueError, FileNotFoundError: no model is named, or the weights do not fit it.
    """
    if model:
        head = None if weights is None else os.fspath(weights)
        config = DepthConfig(load_from=model, head_weights=head, backbone_weights=backbone_weights)
        size = size or HUB_SIZES.get(model)
        config.check_model()
    elif weights:
        config = read_training(
            weights,
            CONFIG_FILENAME,
            DepthConfig,
            preferred=(FINAL_NAME, BEST_NAME),
            backbone_weights=backbone_weights,
        )
    else:
        raise ValueError(f"no model: give --weights of a trained head, or --model {' or '.join(HUB_DEPTHERS)}")
    if size:
        config = with_evaluation_transforms(config, img_size=size)
    depther, description = load_depther(config)
    depther.autocast_dtype = dtype or depther.autocast_dtype
    logger.info("%s, run in %s on %s", description, depther.autocast_dtype, runtime.device())
    return DepthPredictor(config, depther)


def main(argv: Sequence[str] | None = None) -> int:
    """Predict from the command line.

    Args:
        argv: arguments after the program's name. Default: those of the command line.

    Returns:
        0.
    """
    parser = make_parser("depth.predict", __doc__, EPILOG)
    parser.add_argument("--weights", help="a trained head, or the output directory of its training; or of --model")
    parser.add_argument("--model", choices=HUB_DEPTHERS, help="a released model; without --weights, the published ones")
    parser.add_argument(
        "--range",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="depths of the first and the last colour, metres (default: those of each image)",
    )
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    limits = None if arguments.range is None else tuple(arguments.range)
    if limits and not limits[0] < limits[1]:
        raise ValueError(f"--range {limits[0]} {limits[1]}: expected metres, the first number below the second")

    def load() -> Callable[[Image.Image], Files]:
        predictor = load_depth_predictor(
            arguments.weights,
            model=arguments.model,
            backbone_weights=arguments.backbone_weights,
            size=arguments.size,
            dtype=arguments.dtype,
        )

        def predict(image: Image.Image) -> Files:
            depth = predictor(image)
            return {ARRAY: depth, PICTURE: depth_picture(depth, image=image, limits=limits)}

        return predict

    return predict_images(arguments, load, what="depth", last_suffix=PICTURE)


if __name__ == "__main__":
    run_command_line(main)
