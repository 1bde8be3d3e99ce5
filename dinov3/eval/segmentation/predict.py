"""Segmentation of every image in a folder: index masks or objects, and pictures with their names."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinov3.distributed import runtime
from dinov3.eval.command.config import parse_arguments
from dinov3.eval.dense.object_pictures import objects_picture
from dinov3.eval.dense.pictures import segmentation_picture
from dinov3.eval.dense.predicting import Files, make_parser, predict_images, read_training, with_evaluation_transforms
from dinov3.eval.segmentation.config import HUB_SEGMENTORS, TASKS, SegmentationConfig
from dinov3.eval.segmentation.data import CLASSES_FILENAME, make_eval_transforms
from dinov3.eval.segmentation.inference import make_inference
from dinov3.eval.segmentation.objects import segments_of, stuff_indices
from dinov3.eval.segmentation.run import CONFIG_FILENAME, load_segmentor
from dinov3.eval.training.checkpoints import BEST_NAME, FINAL_NAME
from dinov3.heads.mask2former.objects import Panoptic, flatten, instance, panoptic
from dinov3.heads.segmentation import FeatureDecoder
from dinov3.utils.command_line import run_command_line
from dinov3.utils.text import read_lines

logger = logging.getLogger("dinov3")

#: How released models were evaluated.
RELEASED_CONFIG = Path(__file__).parent / "configs" / "config-ade20k-m2f-inference.yaml"
PICTURE, MASK, VIEW = "_segmentation.png", "_labels.png", "_view.png"

EPILOG = f"""\
For every image NAME of the folder, OUT gets
  NAME{MASK}          one class index per pixel, from 0 on (16 bits from 256 classes on)
  NAME{PICTURE}    the image with its classes in colours, and their names
With --task instance, or panoptic (Mask2Former heads)
  NAME_instance.png        the number of the object of each pixel, 0 in none (16 bits); the best object on top
  NAME_instance.json       class, name, score, area and box (left, top, width, height) of each number
  NAME_instance_view.png   the image with its objects in colours, their names and scores

examples:
  python -m dinov3.eval.segmentation.predict --images photos --weights outputs/segmentation --out maps
  python -m dinov3.eval.segmentation.predict --images photos --model dinov3_vit7b16_ms --weights HEAD.pth \\
      --backbone-weights BACKBONE.pth --out maps
"""


class SegmentationPredictor:
    """A segmentation model with the preprocessing of its evaluation.

    Args:
        config: of the run.
        model: in evaluation mode.
        class_names: by class index.
    """

    def __init__(self, config: SegmentationConfig, model: FeatureDecoder, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        self._config = config
        self._model = model
        self._transforms = make_eval_transforms(config, use_tta=False)

    @property
    def stuff(self) -> set[int]:
        """The classes that have no objects."""
        return stuff_indices(self._config, self.class_names)

    def find_objects(self, image: Image.Image, task: str, *, min_score: float = 0.5) -> Panoptic:
        """Predict the objects of an RGB image, seen as a whole, with a Mask2Former head.

        Args:
            image: of mode RGB.
            task: `instance`: objects, which may hide each other, the best on top; `panoptic`: all segments.
            min_score: objects below it are left out.

        Raises:
            ValueError: the head is not a Mask2Former head.
        """
        if self._config.decoder_head.type != "m2f":
            raise ValueError(f"--task {task} needs a Mask2Former head, this one is {self._config.decoder_head.type}")
        (pixels, *_), _ = self._transforms(image, Image.new("L", image.size))
        size = (image.height, image.width)
        prediction = self._model.predict(pixels[None].to(runtime.device()), rescale_to=size)
        logits, masks = (prediction[name][0].float().cpu() for name in ("pred_logits", "pred_masks"))
        if task == "panoptic":
            return panoptic(logits, masks, stuff=self.stuff, min_score=min_score)
        return flatten(instance(logits, masks, stuff=self.stuff, min_score=min_score))

    def __call__(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """Predict the classes of an RGB image: indices, int64 [height, width]."""
        (pixels, *_), _ = self._transforms(image, Image.new("L", image.size))
        evaluation = self._config.eval
        window = (evaluation.crop_size, evaluation.crop_size)
        labels = make_inference(
            pixels[None].to(runtime.device()),
            self._model,
            inference_mode=evaluation.mode,
            decoder_head_type=self._config.decoder_head.type,
            rescale_to=(image.height, image.width),
            n_output_channels=self._config.decoder_head.num_classes,
            crop_size=window,
            stride=(evaluation.stride, evaluation.stride),
            output_activation=functools.partial(torch.argmax, dim=1),
            whole_size=window,
            max_windows_per_batch=evaluation.max_windows_per_batch,
        )
        return labels[0].cpu().numpy()


def load_segmentation_predictor(
    weights: str | os.PathLike[str] | None = None,
    *,
    model: str | None = None,
    backbone_weights: str | None = None,
    size: int | None = None,
    dtype: torch.dtype | None = None,
) -> SegmentationPredictor:
    """Load a segmentation model that takes photos, on this process's device.

    Args:
        weights: a trained head, or the output directory of its training; or the head of `model`.
        model: `dinov3_vit7b16_ms`, with the published weights if `weights` is not given.
        backbone_weights: of the backbone, if they are not where training had them, or not the published ones.
        size: short side that images are resized to, pixels. Default: that of the evaluation.
        dtype: the precision that the model runs in. Default: that of the training.

    Raises:
        ValueError, FileNotFoundError: no model is named, or the weights do not exist or belong to another head.
    """
    if model:
        head = None if weights is None else os.fspath(weights)
        config = dataclasses.replace(
            # The root of the datasets must be given, but none is read.
            parse_arguments([f"config={RELEASED_CONFIG}", "datasets.root=."], SegmentationConfig),
            load_from=model,
            head_weights=head,
            backbone_weights=backbone_weights,
        )
    elif weights:
        config = read_training(
            weights,
            CONFIG_FILENAME,
            SegmentationConfig,
            preferred=(BEST_NAME, FINAL_NAME),
            backbone_weights=backbone_weights,
        )
    else:
        raise ValueError(f"no model: give --weights of a trained head, or --model {' or '.join(HUB_SEGMENTORS)}")
    config.check_model()
    if size:
        config = with_evaluation_transforms(config, img_size=size)
    assert config.load_from is not None
    names_file = Path(config.load_from).parent / CLASSES_FILENAME  # what a training wrote beside its head
    if not model and names_file.is_file():
        names = read_lines(names_file)
    else:
        names = [f"class {number}" for number in range(config.decoder_head.num_classes)]
    segmentor, description = load_segmentor(config)
    segmentor.autocast_dtype = dtype or segmentor.autocast_dtype
    logger.info("%s, run in %s on %s", description, segmentor.autocast_dtype, runtime.device())
    return SegmentationPredictor(config, segmentor, names)


def main(argv: Sequence[str] | None = None) -> int:
    """Predict from the command line.

    Args:
        argv: arguments after the program's name. Default: those of the command line.

    Returns:
        0.
    """
    parser = make_parser("segmentation.predict", __doc__, EPILOG)
    parser.add_argument("--weights", help="a trained head, or the output directory of its training; or of --model")
    parser.add_argument(
        "--model", choices=HUB_SEGMENTORS, help="the released model; without --weights, the published ones"
    )
    parser.add_argument("--task", choices=TASKS, default="semantic", help="what is predicted (default: semantic)")
    parser.add_argument(
        "--min-score", type=float, default=0.5, help="objects of --task instance or panoptic below it are left out"
    )
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)

    def load() -> Callable[[Image.Image], Files]:
        predictor = load_segmentation_predictor(
            arguments.weights,
            model=arguments.model,
            backbone_weights=arguments.backbone_weights,
            size=arguments.size,
            dtype=arguments.dtype,
        )
        names = predictor.class_names

        def predict_objects(image: Image.Image) -> Files:
            found = predictor.find_objects(image, arguments.task, min_score=arguments.min_score)
            return object_files(found, arguments.task, names, image)

        def predict(image: Image.Image) -> Files:
            labels = predictor(image)
            mask = Image.fromarray(labels.astype(np.uint8 if len(names) <= 256 else np.uint16))
            return {MASK: mask, PICTURE: segmentation_picture(labels, class_names=names, image=image)}

        return predict if arguments.task == "semantic" else predict_objects

    last_suffix = PICTURE if arguments.task == "semantic" else f"_{arguments.task}{VIEW}"
    return predict_images(arguments, load, what="segmentation", last_suffix=last_suffix)


def object_files(found: Panoptic, task: str, class_names: Sequence[str], image: Image.Image) -> Files:
    """Return the files of the objects of an image: numbers, descriptions and a picture."""
    segments = [{"name": class_names[one["class"]], **one} for one in segments_of(found)]
    ids = found.ids.numpy()
    labels = [f"{one['name']} {one['score']:.2f}" for one in segments]
    return {
        f"_{task}.png": Image.fromarray(ids.astype(np.uint16)),
        f"_{task}.json": json.dumps(segments, indent=1),
        f"_{task}{VIEW}": objects_picture(ids, labels=labels, image=image),
    }


if __name__ == "__main__":
    run_command_line(main)
