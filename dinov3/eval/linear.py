"""Linear probing of frozen features (DINOv3, arXiv 2508.10104, section 6.2.1 and appendix).

    python dinov3/eval/linear.py \\
      model.config_file=RUN/config.yaml model.pretrained_weights=RUN/teacher_checkpoint.pth \\
      train.dataset=ImageFolder:root=TRAIN train.val_dataset=ImageFolder:root=VAL output_dir=OUT

A linear layer on the class token and the mean patch token is trained with SGD for each of 13 learning rates, all in one
pass over augmented images. The one that is best on the validation images is reported for them and for the test images.

Notable:
- A run that was killed goes on from its newest checkpoint, to the same result (`linear_training`).
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
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dinov3 import distributed
from dinov3.checkpointer import cleanup_checkpoint
from dinov3.configs.settings import format_keys
from dinov3.data import make_classification_eval_transform, make_classification_train_transform, make_dataset
from dinov3.data.transforms import get_target_transform
from dinov3.eval.classification.config import FewShotConfig, TransformConfig
from dinov3.eval.classification.data import (
    check_class_mapping,
    check_test_labels,
    create_train_dataset_dict,
    find_class_mapping,
    get_labels,
    pad_multilabel_and_collate,
)
from dinov3.eval.classification.linear_config import (
    RESULTS_FILENAME,
    EvalConfig,
    LinearEvalConfig,
    LossType,
    OptimizerType,
    SchedulerType,
    TrainConfig,
)
from dinov3.eval.classification.linear_heads import (
    AllClassifiers,
    LinearClassifier,
    LinearPostprocessor,
    create_linear_input,
    export_classifier,
    has_ddp_wrapper,
    remove_ddp_wrapper,
    scale_lr,
    setup_linear_classifiers,
)
from dinov3.eval.classification.linear_scoring import (
    Scorer,
    append_record,
    drop_records,
    format_grid,
    select_best,
    tell_if_at_end,
)
from dinov3.eval.classification.linear_training import (
    BEST,
    CHECKPOINT_FILE,
    FINAL,
    check_checkpoint_path,
    read_checkpoint,
    setup_linear_training,
    train_linear_classifiers,
    write_checkpoint,
)
from dinov3.eval.classification.metrics import (
    ClassificationMetricType,
    TargetKind,
    build_classification_metric,
)
from dinov3.eval.classification.scoring import (
    average_metrics,
    save_per_class,
    save_results,
)
from dinov3.eval.command.config import args_dict_to_dataclass, cli_parser
from dinov3.eval.command.model import load_model
from dinov3.eval.command.results import EvaluationResult, as_file_name, provenance, write_results
from dinov3.eval.features.cache import FeatureCache
from dinov3.eval.features.extraction import model_device
from dinov3.models.intermediate_layers import ModelWithIntermediateLayers
from dinov3.run.init import job_context
from dinov3.utils.command_line import run_command_line

__all__ = [
    "AllClassifiers",
    "EvalConfig",
    "Evaluator",
    "FewShotConfig",
    "LinearClassifier",
    "LinearEvalConfig",
    "LinearPostprocessor",
    "LossType",
    "OptimizerType",
    "SchedulerType",
    "TrainConfig",
    "TransformConfig",
    "benchmark_launcher",
    "create_linear_input",
    "eval_linear_with_model",
    "export_classifier",
    "has_ddp_wrapper",
    "main",
    "make_evaluators",
    "remove_ddp_wrapper",
    "scale_lr",
    "setup_linear_classifiers",
    "setup_linear_training",
    "train_linear_classifiers",
]

logger = logging.getLogger("dinov3")

RECORDS_FILENAME = "results_eval_linear.json"
BEST_CLASSIFIER = "best_classifier"
TOP_1 = "top-1"


@dataclass
class Evaluator:
    """One dataset on which the classifiers are scored.

    Args:
        batch_size: images per step and process.
        num_workers: of the loader.
        transform_config: of the images.
        dataset_str: the dataset.
        metric_type: what is measured.
        metrics_file_path: file to which records are added.
        training_num_classes: number of logits.
        save_results_func: called with logits, targets and `filename_suffix` of the chosen classifier.
        name_suffix: appended to the dataset string, for a second metric on one dataset.
        memory_budget_mb: for features kept between evaluations.
        cache: of features, on disk.
        train_dataset: whose classes are those of the logits; None: those of this dataset.
    """

    batch_size: int
    num_workers: int
    transform_config: TransformConfig
    dataset_str: str
    metric_type: ClassificationMetricType
    metrics_file_path: str | Path
    training_num_classes: int
    save_results_func: Callable[..., None] | None = None
    name_suffix: str = ""
    memory_budget_mb: float = 8192
    cache: FeatureCache | None = None
    train_dataset: Any = None
    dataset: Any = field(init=False)
    top_1: dict[str, float] = field(init=False, default_factory=dict)  # of all classifiers, at the last evaluation

    def __post_init__(self) -> None:
        transform = make_classification_eval_transform(
            resize_size=self.transform_config.resize_size,
            crop_size=self.transform_config.crop_size,
            mean=self.transform_config.mean,
            std=self.transform_config.std,
        )
        target_transform = get_target_transform(self.dataset_str)
        self.dataset = make_dataset(
            dataset_str=self.dataset_str, transform=transform, target_transform=target_transform
        )
        self._class_mapping = find_class_mapping(self.train_dataset, self.dataset, self.dataset_str)
        check_class_mapping(self._class_mapping, self.training_num_classes, self.dataset_str)
        num_classes = self.training_num_classes if self._class_mapping is None else len(self._class_mapping)
        self._check(num_classes)
        kind = self.metric_type.target_kind
        self._scorer = Scorer(
            self.dataset,
            build_classification_metric(self.metric_type, num_classes=num_classes, dataset=self.dataset),
            class_mapping=self._class_mapping,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=pad_multilabel_and_collate if kind is TargetKind.LISTS else None,
            memory_budget_mb=self.memory_budget_mb,
            cache=self.cache,
        )

    @property
    def main_metric_name(self) -> str:
        """Key of the chosen classifier's score in results."""
        return f"{self.dataset_str}{self.name_suffix}_accuracy"

    def is_improvement(self, accuracy: float, best: float) -> bool:
        """Whether a score is at least as good as the best one so far; a negative one means that there is none."""
        return best < 0 or (accuracy <= best if self.metric_type.is_lower_better else accuracy >= best)

    def forget_from(self, iteration: int, prefixstring: str = "") -> None:
        """Drop what was recorded from this iteration on, by a run that was killed; the main process does it."""
        if distributed.is_main_process():
            drop_records(self.metrics_file_path, iteration=iteration, prefix=prefixstring)

    def evaluate_and_maybe_save(
        self,
        feature_model: nn.Module,
        linear_classifiers: nn.Module,
        iteration: int,
        best_classifier_on_val: str | None = None,
        save_filename_suffix: str = "",
        prefixstring: str = "",
        save_predictions: bool = True,
    ) -> dict[str, Any]:
        """Score all classifiers; every process must call it.

        Args:
            feature_model: gives the tokens of as many blocks as the largest classifier sees.
            linear_classifiers: `AllClassifiers`.
            iteration: steps done, for the record.
            best_classifier_on_val: the classifier to report; None: the best one here.
            save_filename_suffix: of saved predictions.
            prefixstring: of the record.
            save_predictions: call `save_results_func`, if there is one.

        Returns:
            `{main_metric_name: percent, "best_classifier": name}`.
        """
        classifiers: Any = remove_ddp_wrapper(linear_classifiers)
        scores, vectors = self._score(feature_model, classifiers)
        self.top_1 = {name: values[TOP_1] for name, values in scores.items()}
        best = best_classifier_on_val or select_best(self.top_1, lower_is_better=self.metric_type.is_lower_better)
        logger.info("%s: %s %.2f, %s", self.main_metric_name, self.metric_type, 100 * self.top_1[best], best)
        if distributed.is_main_process():
            self._record(iteration, prefixstring, best, scores)
        if save_predictions:
            self._save(feature_model, classifiers, best, vectors, save_filename_suffix)
        return {self.main_metric_name: 100.0 * self.top_1[best], BEST_CLASSIFIER: best}

    def _score(self, feature_model: Any, classifiers: Any) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
        return self._scorer.score(feature_model, classifiers)

    def _record(self, iteration: int, prefix: str, best: str, scores: Mapping[str, Mapping[str, float]]) -> None:
        record = {
            "iteration": iteration,
            "prefix": prefix,
            "dataset": self.dataset_str,
            "metric": self.metric_type.value,
            "best_classifier": best,
            "accuracy": scores[best][TOP_1],
            "scores": scores,
        }
        append_record(self.metrics_file_path, record)

    def _save(self, model: Any, classifiers: Any, best: str, vectors: Mapping[str, Any], suffix: str) -> None:
        name = self.dataset_str + self.name_suffix
        if vectors[best]:
            save_per_class(vectors[best], Path(self.metrics_file_path).parent, name, suffix)
        if self.save_results_func is not None:
            name = as_file_name(name) + suffix
            self.save_results_func(**self._scorer.predict(model, classifiers, best), filename_suffix=name)

    def _check(self, num_classes: int) -> None:
        if len(self.dataset) == 0:
            raise ValueError(f"{self.dataset_str} is empty")
        check_test_labels(self.dataset, self.metric_type, num_classes, self.dataset_str)


def make_evaluators(
    config: LinearEvalConfig, training_num_classes: int, cache: FeatureCache | None = None, train_dataset: Any = None
) -> tuple[Evaluator, list[Evaluator]]:
    """The evaluators of the validation dataset, and of the test datasets."""
    metric_types = list(config.eval.test_metric_types) or [config.train.val_metric_type]
    if len(metric_types) == 1:
        metric_types *= len(config.eval.test_datasets)
    pairs = [
        (config.train.val_dataset, config.train.val_metric_type),
        *zip(config.eval.test_datasets, metric_types, strict=True),
    ]
    evaluators: list[Evaluator] = []
    for dataset_str, metric_type in pairs:
        is_second = any(other.dataset_str == dataset_str for other in evaluators)
        evaluators.append(
            Evaluator(
                batch_size=config.eval.batch_size,
                num_workers=config.eval.num_workers,
                transform_config=config.transform,
                dataset_str=dataset_str,
                metric_type=metric_type,
                metrics_file_path=Path(config.output_dir) / RECORDS_FILENAME,
                training_num_classes=training_num_classes,
                save_results_func=functools.partial(save_results, output_dir=config.output_dir)
                if config.save_results
                else None,
                name_suffix=f"_{metric_type.value}" if is_second else "",
                memory_budget_mb=config.train.memory_budget_mb,
                cache=cache,
                train_dataset=train_dataset,
            )
        )
    return evaluators[0], evaluators[1:]


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
    return _evaluate_model(model, autocast_dtype, config)[0]


def benchmark_launcher(eval_args: dict[str, Any]) -> dict[str, float | str]:
    """Load the model that `eval_args` (as of `cli_parser`) name, evaluate it, write and print the results."""
    started = time.perf_counter()
    config, output_dir = args_dict_to_dataclass(eval_args, LinearEvalConfig)
    backbone = load_model(config.model)
    config.transform.check(backbone)
    results, datasets, grids = _evaluate_model(backbone.model, backbone.autocast_dtype, config)
    details = {"validation": {f"try {name}": scores for name, scores in grids.items()}}
    result = EvaluationResult(results, datasets, backbone.description, backbone.autocast_dtype, "", details)
    origin = {**details, **provenance(config, result, time.perf_counter() - started)}
    write_results(results, output_dir, RESULTS_FILENAME, origin)
    if distributed.is_main_process():
        print(_format_report(results, config, datasets, grids))
        print(f"written to {Path(output_dir) / RESULTS_FILENAME}")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate from the command line.

    Args:
        argv: `key=value` tokens after the program's name; None takes them from the command line.

    Returns:
        0.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"}.intersection(argv):
        print(f"{__doc__}\nKeys, their defaults and meanings:\n{format_keys(LinearEvalConfig)}")
        return 0
    eval_args = cli_parser(argv)
    config, output_dir = args_dict_to_dataclass(eval_args, LinearEvalConfig, save_config=False)
    config.model.check()
    with job_context(output_dir=output_dir):
        benchmark_launcher(eval_args)
    return 0


def _evaluate_model(
    model: nn.Module, autocast_dtype: torch.dtype, config: LinearEvalConfig
) -> tuple[dict[str, float | str], dict[str, Any], dict[int, dict[str, float]]]:
    config.transform.check_patches(model)
    config.train.check_blocks(model)
    check_checkpoint_path(config.train, _checkpoint_directory(config, 0))
    cache = config.features.make_cache()
    train_dataset, num_classes = _make_train_dataset(config)
    val_evaluator, test_evaluators = make_evaluators(config, num_classes, cache, train_dataset)
    autocast = functools.partial(_autocast, model_device(model).type, autocast_dtype)
    feature_model = ModelWithIntermediateLayers(model, max(config.train.n_last_blocks_list), autocast)
    few_shot = config.few_shot
    tries = create_train_dataset_dict(train_dataset, few_shot.enable, few_shot.k_or_percent, few_shot.n_tries)
    results: dict[int, dict[str, Any]] = {}
    grids: dict[int, dict[str, float]] = {}
    for name, dataset in tries.items():
        results[name], grids[name] = _evaluate_try(
            config, feature_model, dataset, num_classes, val_evaluator, test_evaluators, cache=cache, name=name
        )
    sizes = {
        "train": {"dataset": config.train.dataset, "images": [len(subset) for subset in tries.values()]},
        "validation": {"dataset": config.train.val_dataset, "images": len(val_evaluator.dataset)},
        "test": [{"dataset": e.dataset_str, "images": len(e.dataset)} for e in test_evaluators],
        "classes": num_classes,
    }
    averaged: dict[str, Any] = results[0] if len(results) == 1 else average_metrics(results, [BEST_CLASSIFIER])
    return averaged, sizes, grids


def _make_train_dataset(config: LinearEvalConfig) -> tuple[Any, int]:
    size, crop = config.transform.resize_size, config.transform.crop_size
    mean, std = config.transform.mean, config.transform.std
    if abs(size - crop * 256 / 224) > 1:
        logger.warning("transform: resize to %d and crop %d; customary is 8:7", size, crop)
    if config.train.augment:
        transform = make_classification_train_transform(crop_size=crop, mean=mean, std=std)
    else:
        transform = make_classification_eval_transform(resize_size=size, crop_size=crop, mean=mean, std=std)
    dataset = make_dataset(
        dataset_str=config.train.dataset,
        transform=transform,
        target_transform=get_target_transform(config.train.dataset),
    )
    if len(dataset) == 0:
        raise ValueError(f"train.dataset={config.train.dataset} is empty")
    labels = get_labels(dataset)
    is_multi_hot = labels.ndim > 1
    if is_multi_hot != (config.train.loss_type is LossType.BINARY_CROSS_ENTROPY):
        have = "multi-hot rows" if is_multi_hot else "one class per image"
        raise ValueError(f"train.loss_type={config.train.loss_type.name} does not go with {have} in train.dataset")
    num_classes = labels.shape[1] if is_multi_hot else int(labels.max()) + 1
    if not is_multi_hot and len(labels.unique()) < 2:
        raise ValueError(
            f"train.dataset has images of a single class, {int(labels[0])}: there is nothing to tell apart"
        )
    return dataset, num_classes


def _evaluate_try(
    config: LinearEvalConfig,
    feature_model: ModelWithIntermediateLayers,
    dataset: Any,
    num_classes: int,
    val_evaluator: Evaluator,
    test_evaluators: Sequence[Evaluator],
    *,
    cache: FeatureCache | None,
    name: int,
) -> tuple[dict[str, Any], dict[str, float]]:
    # The results, and the validation scores of all classifiers in percent.
    directory, suffix = _checkpoint_directory(config, name), _suffix(config, name)
    prefix = f"try {suffix.removeprefix('_')}, " if suffix else ""
    _, classifiers, iteration = train_linear_classifiers(
        feature_model=feature_model,
        train_dataset=dataset,
        train_config=config.train,
        training_num_classes=num_classes,
        val_evaluator=val_evaluator,
        checkpoint_output_dir=directory,
        cache=cache,
        prefixstring=prefix,
    )

    def score(evaluator: Evaluator, chosen: str | None) -> dict[str, Any]:
        return evaluator.evaluate_and_maybe_save(feature_model, classifiers, iteration, chosen, suffix, prefix)

    on_val = score(val_evaluator, None)
    grid = {classifier: 100 * value for classifier, value in val_evaluator.top_1.items()}
    tell_if_at_end(on_val[BEST_CLASSIFIER], config.train)
    _keep_as_best(directory, val_evaluator, on_val[val_evaluator.main_metric_name])
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


def _keep_as_best(directory: Path, evaluator: Evaluator, accuracy: float) -> None:
    # The weights of the last step have been validated only now.
    if not distributed.is_main_process():
        return
    final = directory / FINAL / CHECKPOINT_FILE
    checkpoint = read_checkpoint(final)
    if evaluator.is_improvement(accuracy, checkpoint["best_accuracy"]):
        write_checkpoint(directory / BEST, checkpoint | {"best_accuracy": accuracy})


@contextlib.contextmanager
def _autocast(device: str, dtype: torch.dtype) -> Any:
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        yield


def _format_report(
    results: Mapping[str, Any],
    config: LinearEvalConfig,
    datasets: Mapping[str, Any],
    grids: Mapping[int, Mapping[str, float]],
) -> str:
    n_train = "/".join(str(n) for n in sorted(set(datasets["train"]["images"])))
    lines = [
        f"linear probing, {config.train.val_metric_type.value}, {config.model.describe()}",
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
