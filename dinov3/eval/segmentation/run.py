"""Semantic segmentation: train a linear head on a frozen backbone, evaluate trained and released heads.

See arXiv 2508.10104, sections 6.1 and 6.3.

    python dinov3/eval/segmentation/run.py config=dinov3/eval/segmentation/configs/config-ade20k-linear-training.yaml \\
      datasets.root=ADE20K model.dino_hub=dinov3_vits16 model.weights=FILE output_dir=OUT
    python dinov3/eval/segmentation/run.py config=dinov3/eval/segmentation/configs/config-ade20k-m2f-inference.yaml \\
      datasets.root=ADE20K load_from=dinov3_vit7b16_ms head_weights=FILE backbone_weights=FILE output_dir=OUT

What happens:
    only model.*                   the head of decoder_head is trained, and measured on datasets.val in between
    model.* and load_from=FILE     that trained head is evaluated on datasets.val
    load_from=dinov3_vit7b16_ms    the released Mask2Former model is evaluated

OUT gets segmentation_config.yaml, results-semantic-segmentation.csv and .json (percent; after a training, of the best
validation), and when training model_<iteration>.pth, best.pth, model_final.pth and training_metrics.json. To resume a
training that was stopped, start the same command again.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this directory would hide the standard library's names
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import logging
from collections.abc import Sequence
from typing import Any

from dinov3.distributed import runtime
from dinov3.eval.command.command_line import run_command
from dinov3.eval.command.model import FrozenBackbone, load_model
from dinov3.eval.command.results import EvaluationResult
from dinov3.eval.segmentation.config import HUB_SEGMENTORS, SegmentationConfig
from dinov3.eval.segmentation.data import make_segmentation_dataset, write_class_names
from dinov3.eval.segmentation.eval import evaluate_segmentation_with_config
from dinov3.eval.segmentation.train import HEAD_PREFIXES, build_model, load_segmentation_head_, train_segmentation_head
from dinov3.eval.training.checkpoints import BEST_NAME, FINAL_NAME
from dinov3.eval.training.loop import TrainingResult
from dinov3.heads.segmentation import FeatureDecoder
from dinov3.heads.weights import read_head
from dinov3.hub import segmentors
from dinov3.utils.command_line import run_command_line

logger = logging.getLogger("dinov3")

CONFIG_FILENAME = "segmentation_config.yaml"
RESULTS_FILENAME = "results-semantic-segmentation.csv"
PREDICTIONS_DIRNAME = "predictions"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; see `run_command`."""
    return run_command(
        argv,
        doc=__doc__,
        config_class=SegmentationConfig,
        evaluate=evaluate_segmentation,
        results_file=RESULTS_FILENAME,
        config_file=CONFIG_FILENAME,
        loads_model=False,  # loaded below, because datasets are checked in less time
    )


def evaluate_segmentation(backbone: FrozenBackbone | None, config: SegmentationConfig) -> EvaluationResult:
    """Train, or evaluate a trained head, as `config` describes; see the module.

    Args:
        backbone: what the head is on. Default: loaded as `config.model` describes.
        config: of the run.

    Returns:
        The metrics of `SEGMENTATION_METRICS` in percent.

    Raises:
        ValueError, FileNotFoundError: a dataset, weights or checkpoints cannot be used.
    """
    output_dir = Path(config.output_dir or ".")
    predictions_dir = output_dir / PREDICTIONS_DIRNAME if config.save_predictions else None
    val_set = make_segmentation_dataset(config, "val", use_tta=bool(config.load_from) and config.eval.use_tta)
    sets: dict[str, Any] = {"val": {"dataset": config.datasets.val, "images": len(val_set)}}
    if config.load_from:
        model, description = load_segmentor(config, backbone)
        metrics = evaluate_segmentation_with_config(
            config, model, runtime.device(), dataset=val_set, save_dir=predictions_dir
        )
    else:
        train_set = make_segmentation_dataset(config, "train")
        backbone = _load_backbone(config) if backbone is None else backbone
        description = f"head trained on {backbone.description}"
        write_class_names(val_set, output_dir)
        model, training = train_segmentation_head(backbone.model, config, train_set, val_set)
        if predictions_dir is not None:
            _save_predictions_of_best(config, model, training, val_set, predictions_dir)
        metrics = training.best_metrics
        steps = {"steps": training.iteration, "best after": training.best_iteration}
        sets["train"] = {"dataset": config.datasets.train, "images": len(train_set), **steps}
    logger.info("segmentation: %s", ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
    report = [f"segmentation of {len(val_set)} images of {config.datasets.val}, percent, {description}"]
    report += [f"{name:<12}{value:>8.2f}" for name, value in metrics.items()]
    if "train" in sets:
        report.append(_describe_head(sets["train"], output_dir))
    return EvaluationResult(
        metrics=metrics,
        datasets=sets,
        model=description,
        autocast_dtype=config.model_dtype.autocast_dtype,
        report="\n".join(report),
    )


def load_segmentor(config: SegmentationConfig, backbone: FrozenBackbone | None = None) -> tuple[FeatureDecoder, str]:
    """Load the released model or the trained head that `config.load_from` names, in evaluation mode.

    Args:
        config: of the run.
        backbone: what a trained head is on. Default: loaded as `config.model` describes.

    Returns:
        The model on this process's device, and its description.

    Raises:
        FileNotFoundError: the file does not exist.
        WeightsError: it holds another head, or none.
    """
    assert config.load_from is not None
    if config.load_from in HUB_SEGMENTORS:
        weights = {"weights": config.head_weights, "backbone_weights": config.backbone_weights}
        released: FeatureDecoder = getattr(segmentors, config.load_from)(
            autocast_dtype=config.model_dtype.autocast_dtype,
            num_classes=config.decoder_head.num_classes,
            hidden_dim=config.decoder_head.hidden_dim,
            **{name: path for name, path in weights.items() if path},
        )
        description = f"{config.load_from} with {config.head_weights or 'published weights'}"
        return released.to(runtime.device()), description
    backbone = _load_backbone(config) if backbone is None else backbone
    entries = read_head(config.load_from, prefix=HEAD_PREFIXES[config.decoder_head.type])
    model = load_segmentation_head_(build_model(backbone.model, config), entries, source=config.load_from)
    return model.eval(), f"head {config.load_from} on {backbone.description}"


def _save_predictions_of_best(
    config: SegmentationConfig, model: FeatureDecoder, training: TrainingResult, val_set: Any, directory: Path
) -> None:
    if training.best_iteration != training.iteration:  # the results are those of the best head, not of the last one
        best = directory.parent / BEST_NAME
        load_segmentation_head_(
            model, read_head(best, prefix=HEAD_PREFIXES[config.decoder_head.type]), source=str(best)
        )
    evaluate_segmentation_with_config(config, model, runtime.device(), dataset=val_set, save_dir=directory)


def _describe_head(training: dict[str, Any], output_dir: Path) -> str:
    n_steps, best_after = training["steps"], training["best after"]
    if best_after == n_steps:
        return f"of the head after all {n_steps} steps: {output_dir / FINAL_NAME}"
    best = output_dir / BEST_NAME
    return f"of the head after {best_after} of {n_steps} steps: {best}; the last one is {FINAL_NAME}"


def _load_backbone(config: SegmentationConfig) -> FrozenBackbone:
    assert config.model is not None  # config.check() refuses it
    return load_model(config.model)


if __name__ == "__main__":
    run_command_line(main)
