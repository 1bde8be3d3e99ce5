"""Zero-shot classification, and retrieval between images and captions (dino.txt, arXiv 2412.16334).

    python -m dinov3.eval.text.zero_shot model.weights=HEAD.pth model.backbone_weights=BACKBONE.pth \\
      eval.test_dataset=ImageFolder:root=VAL prompts.classes=imagenet output_dir=OUT

Classification: a class is the mean of the vectors of many sentences about it, and an image takes the class whose vector
has the largest cosine with its own. Images are resized and cropped to 512, as for the published accuracy of ImageNet.

Retrieval, of data sets with captions: R@k is the percentage of images with one of their captions among the k nearest of
all captions, and of captions with their image among the k nearest of all images.

Notable: image features are kept on disk (features.cache), so other names and sentences are tried within seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this directory would hide the standard library's names
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinov3.eval.classification.data import get_labels, make_transform, open_dataset
from dinov3.eval.classification.metrics import ClassificationMetricType, build_classification_metric, check_targets
from dinov3.eval.command.command_line import run_command
from dinov3.eval.command.model import FrozenBackbone
from dinov3.eval.command.results import EvaluationResult
from dinov3.eval.features.extraction import extract_cached, extract_rows, gather_rows, make_enumerated_loader
from dinov3.eval.text.config import ZERO_SHOT_RESULTS_FILENAME, ZeroShotConfig
from dinov3.eval.text.model import ImageEncoder, TextModel, load_text_model
from dinov3.eval.text.prompts import encode_classes, encode_texts, read_class_names, read_templates
from dinov3.eval.text.retrieval import ImagesOfCaptions, recalls
from dinov3.utils.command_line import run_command_line

DATASET_KEY = "eval.test_dataset"
ROWS_PER_STEP = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate from the command line; see `run_command`."""
    return run_command(
        argv,
        doc=__doc__,
        config_class=ZeroShotConfig,
        evaluate=evaluate_zero_shot,
        results_file=ZERO_SHOT_RESULTS_FILENAME,
        loads_model=False,  # loaded below, because the data set and the names are checked in less time
    )


def evaluate_zero_shot(text_model: TextModel | None, config: ZeroShotConfig) -> EvaluationResult:
    """Classify images by the names of their classes, or find captions and images by each other; see the module.

    Args:
        text_model: what is evaluated. Default: loaded as `config.model` describes.
        config: of the run.

    Raises:
        ValueError: the data set has neither labels nor captions, or the names do not fit its classes.
    """
    dataset = open_dataset(config.eval.test_dataset, make_transform(config.transform), DATASET_KEY)
    if hasattr(dataset, "get_captions"):
        return _evaluate_retrieval(text_model, config, dataset)
    return _evaluate_classification(text_model, config, dataset)


def _evaluate_classification(text_model: TextModel | None, config: ZeroShotConfig, dataset: Any) -> EvaluationResult:
    known = getattr(dataset, "classes", None)
    class_names = read_class_names(config.prompts.classes, dataset, None if known is None else len(known))
    templates = read_templates(config.prompts.templates)
    _check_labels(dataset, class_names, config)
    text_model = _load(text_model, config)
    class_features = encode_classes(
        text_model.model, text_model.tokenizer, class_names, templates, batch_size=config.prompts.batch_size
    )
    with text_model.autocast():
        rows = extract_cached(
            ImageEncoder(text_model.model.visual_model),
            dataset,
            config.features.make_store(),
            batch_size=config.eval.batch_size,
            num_workers=config.eval.num_workers,
            description="images",
        )
    metrics, per_class = score_zero_shot(rows.features, rows.targets, class_features, class_names)
    datasets = {
        "test": {"dataset": config.eval.test_dataset, "images": len(dataset)},
        "classes": len(class_names),
        "templates": len(templates),
    }
    title = f"zero-shot classification of {len(dataset)} images, {len(class_names)} classes, {len(templates)} sentences"
    return _result(text_model, config, metrics, datasets, title, {"per_class": per_class})


def score_zero_shot(
    features: Tensor, targets: Tensor, class_features: Tensor, class_names: Sequence[str]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure how often the most similar classes are right; every process calls it with its own rows.

    Args:
        features: of images, [N, E], of length 1.
        targets: classes, [N], integers.
        class_features: [C, E], of length 1.
        class_names: of the C classes.

    Returns:
        `top-1`, from five classes on `top-5`, and `top-1 mean over classes`, in percent; and name, number of images and
        `top-1` of each class (None for a class without images).
    """
    n_classes = len(class_names)
    overall = build_classification_metric(ClassificationMetricType.MEAN_ACCURACY, num_classes=n_classes)
    by_class = build_classification_metric(ClassificationMetricType.PER_CLASS_ACCURACY, num_classes=n_classes, ks=(1,))
    overall, by_class = (metric.to(class_features.device) for metric in (overall, by_class))
    for few, few_targets in zip(features.split(ROWS_PER_STEP), targets.split(ROWS_PER_STEP), strict=True):
        cosines = few.to(class_features.device) @ class_features.mT
        for metric in (overall, by_class):
            metric.update(cosines, few_targets.to(class_features.device))
    metrics = {name: 100 * float(value) for name, value in overall.compute().items()}
    shares, counts = by_class.compute()["top-1"], by_class.summed()[-2]
    metrics["top-1 mean over classes"] = 100 * float(shares[counts > 0].mean())
    per_class = [
        {"class": name, "images": count, "top-1": round(100 * share, 2) if count else None}
        for name, count, share in zip(class_names, counts.tolist(), shares.tolist(), strict=True)
    ]
    return metrics, per_class


def _check_labels(dataset: Any, class_names: Sequence[str], config: ZeroShotConfig) -> None:
    labels = get_labels(dataset)
    check_targets(ClassificationMetricType.MEAN_ACCURACY, labels, DATASET_KEY)
    if int(labels.max()) >= len(class_names):
        raise ValueError(
            f"{DATASET_KEY}={config.eval.test_dataset} has label {int(labels.max())}, but "
            f"prompts.classes={config.prompts.classes} has only {len(class_names)} names, from 0 on"
        )


def _evaluate_retrieval(text_model: TextModel | None, config: ZeroShotConfig, dataset: Any) -> EvaluationResult:
    images = ImagesOfCaptions(dataset)
    captions = [dataset.get_captions(index) for index in range(len(dataset))]
    owners = torch.tensor([index for index, own in enumerate(captions) for _ in own])
    text_model = _load(text_model, config)
    texts = encode_texts(
        text_model.model,
        text_model.tokenizer,
        [caption for own in captions for caption in own],
        batch_size=config.prompts.batch_size,
    )
    loader = make_enumerated_loader(images, config.eval.batch_size, config.eval.num_workers)
    with text_model.autocast():
        rows = gather_rows(extract_rows(ImageEncoder(text_model.model.visual_model), loader, description="images"))
    metrics = recalls(rows.features, texts, owners)
    datasets = {"test": {"dataset": config.eval.test_dataset, "images": len(dataset), "captions": len(owners)}}
    title = f"retrieval among {len(dataset)} images and {len(owners)} captions"
    return _result(text_model, config, metrics, datasets, title, {})


def _load(text_model: TextModel | None, config: ZeroShotConfig) -> TextModel:
    text_model = load_text_model(config.model) if text_model is None else text_model
    backbone = text_model.model.visual_model.backbone
    config.transform.check(FrozenBackbone(backbone, text_model.autocast_dtype, text_model.description))
    return text_model


def _result(
    text_model: TextModel,
    config: ZeroShotConfig,
    metrics: dict[str, float],
    datasets: dict[str, Any],
    title: str,
    details: dict[str, Any],
) -> EvaluationResult:
    lines = [f"{title}, percent", f"{config.eval.test_dataset}, {text_model.description}"]
    lines += [f"{name:<24}{value:>8.2f}" for name, value in metrics.items()]
    return EvaluationResult(
        metrics=metrics,
        datasets=datasets,
        model=text_model.description,
        autocast_dtype=text_model.autocast_dtype,
        report="\n".join(lines),
        details=details,
    )


if __name__ == "__main__":
    run_command_line(main)
