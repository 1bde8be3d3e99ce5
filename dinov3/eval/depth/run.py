"""Depth: train a head on a frozen backbone, evaluate trained and released heads (arXiv 2508.10104, section 6).

    python dinov3/eval/depth/run.py config=dinov3/eval/depth/configs/config-nyu.yaml \\
      datasets.root=NYU model.dino_hub=dinov3_vits16 model.weights=FILE output_dir=OUT
    python dinov3/eval/depth/run.py config=dinov3/eval/depth/configs/config-nyu-synthmix-dpt-inference.yaml \\
      datasets.root=NYU load_from=dinov3_vit7b16_dd head_weights=FILE backbone_weights=FILE output_dir=OUT

What happens:
    model.* alone                        the head of decoder_head is trained, then evaluated on datasets.test
    model.* and load_from=FILE           that trained head is evaluated
    load_from=dinov3_vit7b16_dd          the released model is evaluated; also dinov3_vitl16_chmv2

OUT gets depth_config.yaml, results-depth.csv and .json, TEST_SET/results.json with the figures of every image, and of a
training model_<iteration>.pth, best.pth, model_final.pth and training_metrics.json. A training that was stopped goes on
when the same command is started again.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this directory would hide the standard library's names
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import json
import logging
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from dinov3 import distributed
from dinov3.configs import write_config
from dinov3.configs.settings import format_keys
from dinov3.distributed import runtime
from dinov3.eval.command.config import parse_arguments
from dinov3.eval.command.model import load_model_and_context
from dinov3.eval.command.results import EvaluationResult, provenance, without_nan, write_atomically, write_results
from dinov3.eval.depth.config import HUB_DEPTHERS, IMAGENET_MEAN, IMAGENET_STD, DepthConfig
from dinov3.eval.depth.data import make_depth_dataset
from dinov3.eval.depth.eval import evaluate_depther_with_config, mean_of_finite
from dinov3.eval.depth.train import train_model_with_backbone
from dinov3.heads.depth.depther import Depther, make_depther_from_config
from dinov3.hub import depthers
from dinov3.hub.transforms import normalization_of
from dinov3.run.init import job_context
from dinov3.utils.command_line import run_command_line

logger = logging.getLogger("dinov3")

CONFIG_FILENAME = "depth_config.yaml"
RESULTS_FILENAME = "results-depth.csv"
IMAGES_FILENAME = "results.json"


def run_depth(config: DepthConfig) -> dict[str, float]:
    """Train and evaluate, or evaluate, as `config` describes it, and write the files.

    Returns:
        `<test set>_<metric>`: means over the images that have valid pixels.

    Raises:
        ValueError, FileNotFoundError: the configuration, a dataset, weights or checkpoints are not usable.
    """
    started = time.perf_counter()
    config.check()
    if config.load_from in HUB_DEPTHERS:
        _set_as_released(config)
    split = "test" if config.datasets.test else "val"
    write_config(OmegaConf.structured(config), config.output_dir or ".", CONFIG_FILENAME)
    datasets = [make_depth_dataset(config, split)]
    datasets += [] if config.load_from else [make_depth_dataset(config, name) for name in ("train", "val")]
    depther, dtype, description = load_depther(config)
    dataset = make_depth_dataset(config, split)
    by_image, _, indices = evaluate_depther_with_config(
        config,
        depther,
        runtime.device(),
        reduce_results=False,
        split=split,
        save_dir=config.output_dir,
        dataset=dataset,
    )
    name = getattr(config.datasets, split).partition(":")[0]
    values = cast(dict[str, list[float]], by_image)
    results = {f"{name}_{metric}": mean_of_finite(column) for metric, column in values.items()}
    if distributed.is_main_process():
        content = json.dumps(without_nan({"index": indices, **values}), indent=4)
        write_atomically(Path(config.output_dir) / name / IMAGES_FILENAME, content + "\n")
    sets = {split: {"dataset": getattr(config.datasets, split), "images": len(dataset)}}
    write_results(
        results,
        config.output_dir,
        RESULTS_FILENAME,
        provenance(config, EvaluationResult(results, sets, description, dtype, ""), time.perf_counter() - started),
    )
    logger.info("depth: %s", ", ".join(f"{key} {value:.4f}" for key, value in results.items()))
    if distributed.is_main_process():
        print(f"depth of {len(indices)} images of {getattr(config.datasets, split)}, {description}")
        print("\n".join(f"{key:<24}{value:>10.4f}" for key, value in results.items()))
        print(f"written to {Path(config.output_dir) / RESULTS_FILENAME}")
    return results


def load_depther(config: DepthConfig) -> tuple[Depther, torch.dtype, str]:
    """The model of a run: released, loaded, or trained now.

    Returns:
        The model in evaluation mode on this process's device, its autocast dtype, and what to call it.
    """
    if config.load_from in HUB_DEPTHERS:
        return load_hub_depther(config)
    assert config.model is not None
    backbone, context = load_model_and_context(config.model, config.output_dir)
    dtype = config.model_dtype.autocast_dtype if config.model_dtype else context["autocast_dtype"]
    described = config.model.describe()
    if not config.load_from:
        return train_model_with_backbone(config, backbone, dtype), dtype, f"head trained on {described}"
    depther = make_depther_from_config(backbone, config.decoder_head, config.load_from, autocast_dtype=dtype)
    return depther.to(runtime.device()), dtype, f"head {config.load_from} on {described}"


def load_hub_depther(config: DepthConfig) -> tuple[Depther, torch.dtype, str]:
    """The released model that `load_from` names; `config` gets its head, and its normalisation if none is given."""
    _set_as_released(config)
    name = str(config.load_from)
    dtype = config.model_dtype.autocast_dtype if config.model_dtype else torch.float32
    options: dict[str, Any] = {}
    if config.head_weights:
        options["weights"] = config.head_weights
    if config.backbone_weights:
        options["backbone_weights"] = config.backbone_weights
    depther = getattr(depthers, name)(autocast_dtype=dtype, **options).to(runtime.device())
    return depther, dtype, f"{name} with {config.head_weights or 'published weights'}"


def _set_as_released(config: DepthConfig) -> None:
    name = str(config.load_from)
    config.decoder_head = depthers.config_of(name)
    is_default = (list(config.transforms.mean), list(config.transforms.std)) == (IMAGENET_MEAN, IMAGENET_STD)
    if name == "dinov3_vitl16_chmv2" and is_default:
        mean, std = normalization_of(depthers.DepthWeights.CHMV2)
        config.transforms.mean, config.transforms.std = list(mean), list(std)
        logger.info("images are normalised as %s was trained: mean %s, std %s", name, mean, std)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Args:
        argv: `key=value` tokens after the program's name; None takes them from the command line.

    Returns:
        0.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"}.intersection(argv):
        print(f"{__doc__}\nKeys, their defaults and meanings:\n{format_keys(DepthConfig)}")
        return 0
    config = parse_arguments(argv, DepthConfig)
    config.check()
    with job_context(output_dir=config.output_dir):
        run_depth(config)
    return 0


if __name__ == "__main__":
    run_command_line(main)
