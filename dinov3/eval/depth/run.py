"""Depth: train a head on a frozen backbone, evaluate trained and released heads (arXiv 2508.10104, section 6).

    python dinov3/eval/depth/run.py config=dinov3/eval/depth/configs/config-nyu.yaml \\
      datasets.root=NYU model.dino_hub=dinov3_vits16 model.weights=FILE output_dir=OUT
    python dinov3/eval/depth/run.py config=dinov3/eval/depth/configs/config-nyu-synthmix-dpt-inference.yaml \\
      datasets.root=NYU load_from=dinov3_vit7b16_dd head_weights=FILE backbone_weights=FILE output_dir=OUT

What happens:
    only model.*                         the head of decoder_head is trained, then evaluated on datasets.test
    model.* and load_from=FILE           that trained head is evaluated
    load_from=dinov3_vit7b16_dd          the released model is evaluated; also dinov3_vitl16_chmv2

OUT gets depth_config.yaml, results-depth.csv and .json, TEST_SET/results.json with the figures of every image, and when
training model_<iteration>.pth, best.pth, model_final.pth and training_metrics.json. To resume a training that was
stopped, start the same command again.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this directory would hide the standard library's names
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import dataclasses
import json
import logging
from collections.abc import Sequence

import torch

from dinov3 import distributed
from dinov3.distributed import runtime
from dinov3.eval.command.command_line import run_command
from dinov3.eval.command.model import FrozenBackbone, load_model
from dinov3.eval.command.results import EvaluationResult, without_nan
from dinov3.eval.depth.config import HUB_DEPTHERS, DepthConfig
from dinov3.eval.depth.data import make_depth_dataset
from dinov3.eval.depth.eval import evaluate_depther_with_config, mean_of_finite
from dinov3.eval.depth.train import train_model_with_backbone
from dinov3.heads.depth.depther import Depther, make_depther_from_config
from dinov3.hub import depthers
from dinov3.utils.command_line import run_command_line
from dinov3.utils.files import atomic_write

logger = logging.getLogger("dinov3")

CONFIG_FILENAME = "depth_config.yaml"
RESULTS_FILENAME = "results-depth.csv"
IMAGES_FILENAME = "results.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; see `run_command`."""
    return run_command(
        argv,
        doc=__doc__,
        config_class=DepthConfig,
        evaluate=evaluate_depth,
        results_file=RESULTS_FILENAME,
        config_file=CONFIG_FILENAME,
        loads_model=False,  # loaded below, because datasets are checked in less time
    )


def evaluate_depth(backbone: FrozenBackbone | None, config: DepthConfig) -> EvaluationResult:
    """Train and evaluate, or evaluate, as `config` describes; see the module.

    Args:
        backbone: what the head is on. Default: loaded as `config.model` describes.
        config: of the run.

    Returns:
        `<test set>_<metric>`: means over the images that have valid pixels.

    Raises:
        ValueError, FileNotFoundError: a dataset, weights or checkpoints cannot be used.
    """
    split = "test" if config.datasets.test else "val"
    splits = [split] if config.load_from else sorted({"train", "val", split})
    datasets = {name: make_depth_dataset(config, name) for name in splits}
    if config.load_from:
        depther, description = load_depther(config, backbone)
    else:
        backbone = _load_backbone(config, backbone)
        depther = train_model_with_backbone(
            config, backbone.model, backbone.autocast_dtype, datasets["train"], datasets["val"]
        )
        description = f"head trained on {backbone.description}"
    dataset, text = datasets[split], getattr(config.datasets, split)
    by_image, _, indices = evaluate_depther_with_config(
        config,
        depther,
        runtime.device(),
        reduce_results=False,
        dataset=dataset,
        split=split,
        save_dir=config.output_dir,
    )
    name = text.partition(":")[0]
    results = {f"{name}_{metric}": mean_of_finite(values) for metric, values in by_image.items()}
    images_file = Path(config.output_dir) / name / IMAGES_FILENAME
    if distributed.is_main_process():
        with atomic_write(images_file, "w") as file:
            file.write(json.dumps(without_nan({"index": indices, **by_image}), indent=4) + "\n")
    logger.info("depth: %s", ", ".join(f"{key} {value:.4f}" for key, value in results.items()))
    table = "\n".join(f"{key:<24}{value:>10.4f}" for key, value in results.items())
    return EvaluationResult(
        metrics=results,
        datasets={split: {"dataset": text, "images": len(dataset)}},
        model=description,
        autocast_dtype=depther.autocast_dtype,
        report=f"depth of {len(dataset)} images of {text}, {description}\n{table}",
        files=[images_file],
    )


def load_depther(config: DepthConfig, backbone: FrozenBackbone | None = None) -> tuple[Depther, str]:
    """Load the released model or the trained head that `config.load_from` names, in evaluation mode.

    Args:
        config: of the run.
        backbone: what a trained head is on. Default: loaded as `config.model` describes.

    Returns:
        The model on this process's device, and its description.
    """
    if config.load_from in HUB_DEPTHERS:
        weights = {"weights": config.head_weights, "backbone_weights": config.backbone_weights}
        depther: Depther = getattr(depthers, config.load_from)(
            autocast_dtype=config.model_dtype.autocast_dtype if config.model_dtype else torch.float32,
            **{name: path for name, path in weights.items() if path},
        )
        description = f"{config.load_from} with {config.head_weights or 'published weights'}"
    else:
        backbone = _load_backbone(config, backbone)
        depther = make_depther_from_config(
            backbone.model, config.decoder_head, config.load_from, autocast_dtype=backbone.autocast_dtype
        )
        description = f"head {config.load_from} on {backbone.description}"
    return depther.to(runtime.device()), description


def _load_backbone(config: DepthConfig, backbone: FrozenBackbone | None) -> FrozenBackbone:
    if backbone is None:
        assert config.model is not None  # config.check() refuses it
        backbone = load_model(config.model)
    dtype = config.model_dtype.autocast_dtype if config.model_dtype else backbone.autocast_dtype
    return dataclasses.replace(backbone, autocast_dtype=dtype)


if __name__ == "__main__":
    run_command_line(main)
