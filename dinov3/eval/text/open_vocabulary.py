"""Segmentation by the names of classes, without training (dino.txt, arXiv 2412.16334, section 4).

    python -m dinov3.eval.text.open_vocabulary model.weights=HEAD.pth model.backbone_weights=BACKBONE.pth \\
      eval.test_dataset=SegmentationFolder:split=val:root=DIR output_dir=OUT
    python -m dinov3.eval.text.open_vocabulary model.weights=HEAD.pth model.backbone_weights=BACKBONE.pth \\
      eval.test_dataset=ADE20K:split=VAL:root=DIR prompts.classes=NAMES.txt output_dir=OUT

A class is the mean of the vectors of many sentences about it, in the half of their channels that is aligned with patch
tokens. A patch is compared with each class. By default, as for the published mIoU, images are resized to a short side
of 512, and windows of 384 slide over them, 192 pixels from one to the next.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this directory would hide the standard library's names
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dinov3.data import make_classification_eval_transform
from dinov3.eval.command.command_line import run_command
from dinov3.eval.command.results import EvaluationResult
from dinov3.eval.dense.config import DatasetsConfig
from dinov3.eval.dense.data import make_paired_dataset
from dinov3.eval.features.extraction import make_enumerated_loader
from dinov3.eval.segmentation.data import class_names_of, require_label_maps
from dinov3.eval.segmentation.eval import count_areas, summarise_areas
from dinov3.eval.segmentation.inference import make_inference
from dinov3.eval.segmentation.metrics import sum_areas, total_area_to_metrics
from dinov3.eval.segmentation.transforms import MaskToTensor
from dinov3.eval.text.config import (
    OPEN_VOCABULARY_RESULTS_FILENAME,
    OpenVocabularyConfig,
    OpenVocabularyEvalConfig,
)
from dinov3.eval.text.model import TextModel, load_text_model
from dinov3.eval.text.prompts import encode_classes, read_class_names, read_templates
from dinov3.eval.text.segmenter import OpenVocabularySegmenter, patch_channels
from dinov3.utils.command_line import run_command_line

DATASET_KEY = "eval.test_dataset"
PREDICTIONS_DIRNAME = "predictions"


class ShortSideTransform:
    """Resize the short side of an image as published, truncating the other one, and normalise; the label map stays."""

    def __init__(self, short_side: int) -> None:
        self.transform = make_classification_eval_transform(resize_size=short_side, crop_size=None)
        self.to_label = MaskToTensor()

    def __call__(self, image: Any, label: Any) -> tuple[list[Tensor], Tensor]:
        """Return [image [3, H, W]] and label [1, h, w], as segmentation evaluations have them."""
        image, label = self.to_label(image, label)
        return [self.transform(image)], label


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate from the command line; see `run_command`."""
    return run_command(
        argv,
        doc=__doc__,
        config_class=OpenVocabularyConfig,
        evaluate=evaluate_open_vocabulary,
        results_file=OPEN_VOCABULARY_RESULTS_FILENAME,
        loads_model=False,  # loaded below, because the data set and the names are checked in less time
    )


def evaluate_open_vocabulary(text_model: TextModel | None, config: OpenVocabularyConfig) -> EvaluationResult:
    """Segment images by the names of their classes; see the module.

    Args:
        text_model: what is evaluated. Default: loaded as `config.model` describes.
        config: of the run.

    Raises:
        ValueError: the data set has no label maps, or the names do not fit its classes.
    """
    evaluation, text = config.eval, config.eval.test_dataset
    reduce_zero_label = require_label_maps(text, DATASET_KEY, evaluation.reduce_zero_label)
    datasets = DatasetsConfig(root="", val=text)
    dataset = make_paired_dataset(datasets, "val", ShortSideTransform(evaluation.short_side))
    known = class_names_of(dataset)
    class_names = read_class_names(config.prompts.classes, dataset, None if known is None else len(known))
    templates = read_templates(config.prompts.templates)
    text_model = load_text_model(config.model) if text_model is None else text_model
    class_features = encode_classes(
        text_model.model,
        text_model.tokenizer,
        class_names,
        templates,
        channels=patch_channels(text_model.model),
        batch_size=config.prompts.batch_size,
    )
    with text_model.autocast():
        areas = count_areas(
            OpenVocabularySegmenter(text_model.model, class_features, evaluation.patch_tokens),
            make_enumerated_loader(dataset, batch_size=1, num_workers=evaluation.num_workers),
            text_model.device,
            len(class_names),
            text_model.autocast_dtype,
            infer=make_text_inference(evaluation),
            reduce_zero_label=reduce_zero_label,
            class_names=class_names,
            save_dir=Path(config.output_dir) / PREDICTIONS_DIRNAME if evaluation.save_predictions else None,
            has_objects=getattr(dataset, "has_objects", False),
        )
    metrics = summarise_areas(areas, class_names=class_names)
    sets = {"test": {"dataset": text, "images": len(dataset)}, "classes": len(class_names), "templates": len(templates)}
    lines = [f"open-vocabulary segmentation of {len(dataset)} images, {len(class_names)} classes, percent"]
    lines += [f"{text}, {text_model.description}", *(f"{name:<12}{value:>8.2f}" for name, value in metrics.items())]
    return EvaluationResult(
        metrics=metrics,
        datasets=sets,
        model=text_model.description,
        autocast_dtype=text_model.autocast_dtype,
        report="\n".join(lines),
        details={"per_class": _per_class(areas, class_names), "reduce_zero_label": reduce_zero_label},
    )


def make_text_inference(config: OpenVocabularyEvalConfig) -> Any:
    """Return `make_inference` with the windows of `config`, for images that are not resized any more."""
    return functools.partial(
        make_inference,
        inference_mode=config.mode,
        crop_size=(config.crop_size, config.crop_size),
        stride=(config.stride, config.stride),
        whole_size=None,
        max_windows_per_batch=config.max_windows_per_batch,
    )


def _per_class(areas: Sequence[Tensor], class_names: Sequence[str]) -> list[dict[str, Any]]:
    # NaN, of a class that is neither labelled nor predicted, is None in the file.
    by_class = total_area_to_metrics(*sum_areas(areas))
    shares = [[round(100 * share, 2) for share in by_class[metric].tolist()] for metric in ("mIoU", "acc")]
    return [
        {"class": name, "IoU": iou if iou == iou else None, "acc": accuracy if accuracy == accuracy else None}
        for name, iou, accuracy in zip(class_names, *shares, strict=True)
    ]


if __name__ == "__main__":
    run_command_line(main)
