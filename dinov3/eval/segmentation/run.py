"""Semantic segmentation: train a linear head on a frozen backbone, or evaluate one (arXiv 2508.10104, section 6.1).

    python dinov3/eval/segmentation/run.py config=dinov3/eval/segmentation/configs/config-ade20k-linear-training.yaml \\
      datasets.root=ADE20K model.dino_hub=dinov3_vits16 model.weights=FILE output_dir=OUT

What happens:
    model.* alone                  the head of decoder_head is trained, and measured on datasets.val in between
    model.* and load_from=FILE     that trained head is evaluated on datasets.val

OUT gets segmentation_config.yaml, results-semantic-segmentation.csv and .json (percent; after a training, of the best
validation), and of a training model_<iteration>.pth, best.pth, model_final.pth and training_metrics.json. A training
that was stopped goes on when the same command is started again.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this directory would hide the standard library's names
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import logging
import time
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from dinov3 import distributed
from dinov3.configs import write_config
from dinov3.configs.settings import format_keys
from dinov3.distributed import runtime
from dinov3.eval.command.config import parse_arguments
from dinov3.eval.command.model import load_model_and_context
from dinov3.eval.command.results import EvaluationResult, provenance, write_results
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.data import make_segmentation_dataset, write_class_names
from dinov3.eval.segmentation.eval import evaluate_segmentation_with_config
from dinov3.eval.segmentation.train import HEAD_PREFIX, build_model, load_segmentation_head_, train_segmentation_head
from dinov3.eval.training.checkpoints import BEST_NAME, FINAL_NAME
from dinov3.heads.segmentation import FeatureDecoder
from dinov3.heads.weights import read_head
from dinov3.run.init import job_context
from dinov3.utils.command_line import run_command_line

logger = logging.getLogger("dinov3")

CONFIG_FILENAME = "segmentation_config.yaml"
RESULTS_FILENAME = "results-semantic-segmentation.csv"
PREDICTIONS_DIRNAME = "predictions"


def run_segmentation(config: SegmentationConfig) -> dict[str, float]:
    """Train, or evaluate, as `config` describes it, and write the files.

    Returns:
        The metrics of `SEGMENTATION_METRICS` in percent.

    Raises:
        ValueError, FileNotFoundError: the configuration, a dataset, weights or checkpoints are not usable.
    """
    started = time.perf_counter()
    config.check()
    output_dir = config.output_dir or "."
    write_config(OmegaConf.structured(config), config.output_dir or ".", CONFIG_FILENAME)
    val_set = make_segmentation_dataset(config, "val", use_tta=bool(config.load_from) and config.eval.use_tta)
    sets: dict[str, Any] = {"val": {"dataset": config.datasets.val, "images": len(val_set)}}
    if not config.load_from:
        sets["train"] = {
            "dataset": config.datasets.train,
            "images": len(make_segmentation_dataset(config, "train")),
        }
        write_class_names(val_set, output_dir)
    assert config.model is not None
    backbone, _ = load_model_and_context(config.model, output_dir)
    described = config.model.describe()
    if config.load_from:
        results = test_segmentation(backbone, config, dataset=val_set)
        description = f"head {config.load_from} on {described}"
    else:
        model, training = train_segmentation_head(backbone, config)
        results = training.best_metrics
        description = f"head trained on {described}"
        sets["train"] |= {"steps": training.iteration, "best after": training.best_iteration}
        if config.save_predictions:
            if training.best_iteration != training.iteration:  # the results are those of the best head
                best = Path(output_dir) / BEST_NAME
                load_segmentation_head_(model, read_head(best, prefix=HEAD_PREFIX), source=str(best))
            evaluate_segmentation_with_config(
                config, model, runtime.device(), dataset=val_set, save_dir=Path(output_dir) / PREDICTIONS_DIRNAME
            )
    seconds = time.perf_counter() - started
    write_results(
        results,
        output_dir,
        RESULTS_FILENAME,
        provenance(
            config, EvaluationResult(results, sets, description, config.model_dtype.autocast_dtype, ""), seconds
        ),
    )
    logger.info("segmentation: %s", ", ".join(f"{name} {value:.2f}" for name, value in results.items()))
    if distributed.is_main_process():
        print(f"segmentation of {len(val_set)} images of {config.datasets.val}, percent, {description}")
        print("\n".join(f"{name:<12}{value:>8.2f}" for name, value in results.items()))
        if not config.load_from:
            _print_which_head(sets["train"], output_dir)
        print(f"written to {Path(output_dir) / RESULTS_FILENAME}")
    return results


def test_segmentation(backbone: nn.Module, config: SegmentationConfig, *, dataset: Any = None) -> dict[str, float]:
    """Measure the trained head `config.load_from` on a backbone.

    Args:
        backbone: that it was trained on.
        config: of the run.
        dataset: with the transforms; None: made anew.

    Returns:
        The metrics in percent.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it holds another head, or none.
    """
    model = load_segmentor(backbone, config)
    save_dir = Path(config.output_dir or ".") / PREDICTIONS_DIRNAME if config.save_predictions else None
    return evaluate_segmentation_with_config(
        config, model, runtime.device(), dataset=dataset, use_tta=config.eval.use_tta, save_dir=save_dir
    )


def load_segmentor(backbone: nn.Module, config: SegmentationConfig) -> FeatureDecoder:
    """A backbone with the trained head `config.load_from`, in evaluation mode; errors as of `test_segmentation`."""
    assert config.load_from is not None
    entries = read_head(config.load_from, prefix=HEAD_PREFIX)
    return load_segmentation_head_(build_model(backbone, config), entries, source=config.load_from).eval()


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Args:
        argv: `key=value` tokens after the program's name; None takes them from the command line.

    Returns:
        0.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"}.intersection(argv):
        print(f"{__doc__}\nKeys, their defaults and meanings:\n{format_keys(SegmentationConfig)}")
        return 0
    config = parse_arguments(argv, SegmentationConfig)
    config.check()
    with job_context(output_dir=config.output_dir):
        run_segmentation(config)
    return 0


def _print_which_head(training: dict[str, Any], output_dir: str) -> None:
    if training["best after"] == training["steps"]:
        print(f"of the head after all {training['steps']} steps: {Path(output_dir) / FINAL_NAME}")
    else:
        print(
            f"of the head after {training['best after']} of {training['steps']} steps: {Path(output_dir) / BEST_NAME}; "
            f"the last one is {FINAL_NAME}"
        )


if __name__ == "__main__":
    run_command_line(main)
