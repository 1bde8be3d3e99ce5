"""Linear probing of frozen features (DINOv3, arXiv 2508.10104, section 6.2.1 and appendix).

    python dinov3/eval/linear.py \\
      model.config_file=RUN/config.yaml model.pretrained_weights=RUN/teacher_checkpoint.pth \\
      train.dataset=ImageFolder:root=TRAIN train.val_dataset=ImageFolder:root=VAL output_dir=OUT

A linear layer on the class token and the mean patch token is trained with SGD for each of 13 learning rates, all in one
pass over augmented images. The one that is best on the validation images is reported for them and for the test images.

Notable:
- A run that was killed continues from its newest checkpoint, to the same result.
- `train.augment=false` trains on features that are computed once; with `features.cache` the next run finds them.
- Learning rates are for a global batch of 256 and scale with it. The defaults are made for 8 processes of 128 images;
  `train.batch_size` is that of one process, so twice the processes with half of it give the same result.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this directory would hide the standard library's names
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.checkpointer import cleanup_checkpoint
from dinov3.data import make_classification_train_transform
from dinov3.eval.classification.data import (
    count_classes,
    create_train_dataset_dict,
    make_transform,
    open_dataset,
    read_train_labels,
)
from dinov3.eval.classification.linear_config import RESULTS_FILENAME, LinearEvalConfig, LossType
from dinov3.eval.classification.linear_heads import names_in_state
from dinov3.eval.classification.linear_scoring import (
    BEST_CLASSIFIER,
    Evaluator,
    format_grid,
    make_evaluators,
    warn_if_at_end,
)
from dinov3.eval.classification.linear_training import (
    BEST,
    CHECKPOINT_FILE,
    FINAL,
    find_checkpoint,
    read_checkpoint,
    train_linear_classifiers,
    write_checkpoint,
)
from dinov3.eval.classification.scoring import average_metrics
from dinov3.eval.command.command_line import run_command
from dinov3.eval.command.model import FrozenBackbone
from dinov3.eval.command.results import EvaluationResult
from dinov3.eval.features.cache import FeatureStore
from dinov3.eval.training.checkpoints import unwrap_ddp_state_dict
from dinov3.models.intermediate_layers import ModelWithIntermediateLayers
from dinov3.utils.command_line import run_command_line

logger = logging.getLogger("dinov3")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate from the command line; see `run_command`."""
    return run_command(
        argv, doc=__doc__, config_class=LinearEvalConfig, evaluate=evaluate_linear, results_file=RESULTS_FILENAME
    )


def eval_linear_with_model(
    *, model: nn.Module, autocast_dtype: torch.dtype, config: LinearEvalConfig
) -> dict[str, float | str]:
    """Run the evaluation that `config` describes on a backbone, and write its records and score files.

    Args:
        model: has `get_intermediate_layers`.
        autocast_dtype: what it runs in; float32 means float32.
        config: datasets and settings; `config.model` is not looked at.

    Returns:
        `<dataset string>_accuracy` in percent, last test dataset first, validation last, and `best_classifier`; with
        several tries `_mean` and `_std` of the former.
    """
    return evaluate_linear(FrozenBackbone(model, autocast_dtype), config).metrics


def export_classifier(checkpoint: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return one classifier of a checkpoint as the state dict of a linear layer.

    With one block it fits a linear head of the hub, as `weights=` of `dinov3_vit7b16_lc`.

    Args:
        checkpoint: what a `checkpoint.pth` holds.
        name: of the classifier.

    Returns:
        `weight` [C, W] and `bias` [C].

    Raises:
        ValueError: it is not there; names those that are.
    """
    state = unwrap_ddp_state_dict(checkpoint["linear_classifiers"])
    prefix = f"classifiers_dict.{name}.linear."
    found = {entry.removeprefix(prefix): tensor for entry, tensor in state.items() if entry.startswith(prefix)}
    if not found:
        raise ValueError(f"no classifier {name!r} in the checkpoint; it has {', '.join(names_in_state(state))}")
    return found


def evaluate_linear(backbone: FrozenBackbone, config: LinearEvalConfig) -> EvaluationResult:
    """Evaluate as `config` describes; see the module."""
    config.transform.check(backbone)
    config.train.check_blocks(backbone.model)
    if distributed.is_main_process():  # before any image is read
        find_checkpoint(config.train, _checkpoint_directory(config, 0))
    # Features are extracted at once only if they fit into `train.memory_budget_mb`, so none go to a file.
    store = config.features.make_store(memory_budget_mb=math.inf)
    train_dataset, num_classes = _make_train_dataset(config)
    val_evaluator, test_evaluators = make_evaluators(config, num_classes, store, train_dataset)
    n_blocks = max(config.train.n_last_blocks_list)
    feature_model = ModelWithIntermediateLayers(backbone.model, n_blocks, backbone.autocast)
    few_shot = config.few_shot
    tries = create_train_dataset_dict(train_dataset, few_shot.enable, few_shot.k_or_percent, few_shot.n_tries)
    results, grids = {}, {}
    for name, dataset in tries.items():
        results[name], grids[name] = _evaluate_try(
            config, feature_model, dataset, num_classes, val_evaluator, test_evaluators, store=store, name=name
        )
    metrics = results[0] if len(results) == 1 else average_metrics(results, [BEST_CLASSIFIER])
    datasets = {
        "train": {"dataset": config.train.dataset, "images": [len(subset) for subset in tries.values()]},
        "validation": {"dataset": config.train.val_dataset, "images": len(val_evaluator.dataset)},
        "test": [{"dataset": e.dataset_str, "images": len(e.dataset)} for e in test_evaluators],
        "classes": num_classes,
    }
    return EvaluationResult(
        metrics=metrics,
        datasets=datasets,
        model=backbone.description,
        autocast_dtype=backbone.autocast_dtype,
        report=_format_report(metrics, config, datasets, grids, backbone.description),
        details={"validation": {f"try {name}": scores for name, scores in grids.items()}},
    )


def _make_train_dataset(config: LinearEvalConfig) -> tuple[Any, int]:
    transform = make_transform(config.transform)
    if config.train.augment:
        crop, mean, std = config.transform.crop_size, config.transform.mean, config.transform.std
        transform = make_classification_train_transform(crop_size=crop, mean=mean, std=std)
    dataset = open_dataset(config.train.dataset, transform, "train.dataset")
    labels = read_train_labels(dataset)
    is_multi_hot = labels.ndim > 1
    if is_multi_hot != (config.train.loss_type is LossType.BINARY_CROSS_ENTROPY):
        have = "multi-hot rows" if is_multi_hot else "one class per image"
        raise ValueError(f"train.loss_type={config.train.loss_type.name} does not go with {have} in train.dataset")
    return dataset, count_classes(labels)


def _evaluate_try(
    config: LinearEvalConfig,
    feature_model: ModelWithIntermediateLayers,
    dataset: Any,
    num_classes: int,
    val_evaluator: Evaluator,
    test_evaluators: Sequence[Evaluator],
    *,
    store: FeatureStore,
    name: int,
) -> tuple[dict[str, Any], dict[str, float]]:
    # Returns the results, and the validation scores of all classifiers in percent.
    directory, suffix = _checkpoint_directory(config, name), _suffix(config, name)
    prefix = f"try {suffix.removeprefix('_')}, " if suffix else ""
    _, classifiers, iteration = train_linear_classifiers(
        feature_model=feature_model,
        train_dataset=dataset,
        train_config=config.train,
        training_num_classes=num_classes,
        val_evaluator=val_evaluator,
        checkpoint_output_dir=directory,
        store=store,
        prefixstring=prefix,
    )

    def score(evaluator: Evaluator, chosen: str | None) -> dict[str, Any]:
        return evaluator.evaluate_and_maybe_save(feature_model, classifiers, iteration, chosen, suffix, prefix)

    on_val = score(val_evaluator, None)
    grid = {classifier: 100 * value for classifier, value in val_evaluator.top_1.items()}
    warn_if_at_end(on_val[BEST_CLASSIFIER], config.train)
    if distributed.is_main_process():
        # The weights of the last step have been validated only now.
        accuracy = on_val[val_evaluator.main_metric_name]
        checkpoint = read_checkpoint(directory / FINAL / CHECKPOINT_FILE)
        if val_evaluator.is_improvement(accuracy, checkpoint["best_accuracy"]):
            write_checkpoint(directory / BEST, checkpoint | {"best_accuracy": accuracy})
    results: dict[str, Any] = {}
    for evaluator in test_evaluators:
        results = score(evaluator, on_val[BEST_CLASSIFIER]) | results
    if distributed.is_main_process():
        cleanup_checkpoint(directory, config.train.checkpoint_retention_policy)
        with contextlib.suppress(OSError):  # not empty
            directory.rmdir()
    distributed.barrier()
    return results | on_val, grid


def _suffix(config: LinearEvalConfig, name: int) -> str:
    return "" if config.few_shot.n_tries == 1 else f"_{name}"


def _checkpoint_directory(config: LinearEvalConfig, name: int) -> Path:
    return Path(config.output_dir) / f"checkpoints{_suffix(config, name)}"


def _format_report(
    results: Mapping[str, Any],
    config: LinearEvalConfig,
    datasets: Mapping[str, Any],
    grids: Mapping[int, Mapping[str, float]],
    model: str,
) -> str:
    n_train = "/".join(str(n) for n in sorted(set(datasets["train"]["images"])))
    lines = [
        f"linear probing, {config.train.val_metric_type.value}, {model}",
        f"{n_train} training images, {datasets['validation']['images']} validation images, "
        f"{datasets['classes']} classes",
    ]
    if len(grids) == 1:
        lines.append(format_grid(grids[0], config.train, str(results[BEST_CLASSIFIER])))
    width = max(len(name) for name in results)
    for name, value in results.items():
        lines.append(f"{name:<{width}}  " + (value if isinstance(value, str) else f"{value:.2f}"))
    return "\n".join(lines)


if __name__ == "__main__":
    run_command_line(main)
