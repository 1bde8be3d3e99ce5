"""Scores of a grid of classifiers on one dataset, the choice among them, and the record of all scores."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.data import make_classification_eval_transform
from dinov3.eval.classification.config import TransformConfig
from dinov3.eval.classification.data import make_scored_dataset, open_dataset
from dinov3.eval.classification.linear_config import LinearEvalConfig, TrainConfig
from dinov3.eval.classification.linear_heads import AllClassifiers, LinearInputs, classifier_names, scale_lr
from dinov3.eval.classification.metrics import ClassificationMetricType, scalar_results
from dinov3.eval.classification.scoring import save_per_class, save_results
from dinov3.eval.command.progress import track
from dinov3.eval.command.results import as_file_name
from dinov3.eval.features.cache import IN_MEMORY, FeatureRows, FeatureStore, model_device
from dinov3.eval.features.extraction import ResultsAccumulator, extract_cached, make_enumerated_loader
from dinov3.utils.files import atomic_write

logger = logging.getLogger("dinov3")

RECORDS_FILENAME = "results_eval_linear.json"
BEST_CLASSIFIER = "best_classifier"
TOP_1 = "top-1"

Batch = tuple[Tensor, Tensor, Tensor]  # inputs [B, W], positions in the dataset [B], targets


@dataclass
class Evaluator:
    """One dataset on which the classifiers are scored.

    Attributes:
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
        store: of features kept between runs.
        train_dataset: whose classes are those of the logits. Default: those of this dataset.
        dataset: what `dataset_str` names.
        top_1: of all classifiers, at the last evaluation.
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
    store: FeatureStore = IN_MEMORY
    train_dataset: Any = None
    dataset: Any = field(init=False)
    top_1: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        transform = make_classification_eval_transform(**asdict(self.transform_config))
        self.dataset = open_dataset(self.dataset_str, transform, self.dataset_str)
        self._scored = make_scored_dataset(
            self.dataset,
            self.metric_type,
            train_dataset=self.train_dataset,
            num_classes=self.training_num_classes,
            name=self.dataset_str,
        )
        self._rows: FeatureRows | None = None
        self._model: nn.Module | None = None  # whose features the rows are

    @property
    def main_metric_name(self) -> str:
        """Key of the chosen classifier's score in results."""
        return f"{self.dataset_str}{self.name_suffix}_accuracy"

    def is_improvement(self, accuracy: float, best: float) -> bool:
        """Return whether a score is at least as good as the best one so far; a negative `best` means there is none."""
        if math.isnan(best) or best < 0:
            return True
        return accuracy <= best if self.metric_type.is_lower_better else accuracy >= best

    def forget_from(self, iteration: int, prefixstring: str = "") -> None:
        """Drop what a run that was killed recorded from this iteration on; the main process does it."""
        if distributed.is_main_process():
            records = _read_records(Path(self.metrics_file_path))
            remaining = [r for r in records if r["prefix"] != prefixstring or r["iteration"] < iteration]
            if len(remaining) < len(records):
                _write_records(Path(self.metrics_file_path), remaining)

    def evaluate_and_maybe_save(
        self,
        feature_model: nn.Module,
        linear_classifiers: AllClassifiers,
        iteration: int,
        best_classifier_on_val: str | None = None,
        save_filename_suffix: str = "",
        prefixstring: str = "",
        save_predictions: bool = True,
    ) -> dict[str, Any]:
        """Score all classifiers; every process must call it.

        Args:
            feature_model: gives the tokens of as many blocks as the largest classifier sees.
            linear_classifiers: the grid; those that diverged are left out.
            iteration: steps done, for the record.
            best_classifier_on_val: the classifier to report. Default: the best one here.
            save_filename_suffix: of saved predictions.
            prefixstring: of the record.
            save_predictions: call `save_results_func`, if there is one.

        Returns:
            `{main_metric_name: percent, "best_classifier": name}`.
        """
        scores, vectors = self._score(feature_model, linear_classifiers)
        self.top_1 = {name: values[TOP_1] for name, values in scores.items()}
        best = best_classifier_on_val or select_best(self.top_1, lower_is_better=self.metric_type.is_lower_better)
        logger.info("%s: %s %.2f, %s", self.main_metric_name, self.metric_type, 100 * self.top_1[best], best)
        if distributed.is_main_process():
            record = {
                "iteration": iteration,
                "prefix": prefixstring,
                "dataset": self.dataset_str,
                "metric": self.metric_type.value,
                "best_classifier": best,
                "accuracy": scores[best][TOP_1],
                "scores": scores,
            }
            path = Path(self.metrics_file_path)
            _write_records(path, [*_read_records(path), record])
        if save_predictions:
            name = self.dataset_str + self.name_suffix
            if vectors[best]:
                save_per_class(vectors[best], Path(self.metrics_file_path).parent, name, save_filename_suffix)
            if self.save_results_func is not None:
                batches = self._batches(feature_model, linear_classifiers)
                predictions = predict(linear_classifiers, best, batches, self._scored.class_mapping)
                self.save_results_func(**predictions, filename_suffix=as_file_name(name) + save_filename_suffix)
        return {self.main_metric_name: 100.0 * self.top_1[best], BEST_CLASSIFIER: best}

    def _score(
        self, feature_model: nn.Module, classifiers: AllClassifiers
    ) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
        batches = self._batches(feature_model, classifiers)
        return score_classifiers(classifiers, batches, self._scored.metric, self._scored.class_mapping)

    def _batches(self, feature_model: Any, classifiers: AllClassifiers) -> Iterable[Batch]:
        n_blocks = max(classifier.use_n_blocks for classifier in classifiers.classifiers_dict.values())
        model = LinearInputs(feature_model, n_blocks).eval()
        collate_fn = self._scored.collate_fn
        if self._model is not feature_model and not model.fit_into(self.memory_budget_mb, self.dataset):
            loader = make_enumerated_loader(self.dataset, self.batch_size, self.num_workers, collate_fn)
            return _batches_of_images(model, loader)
        if self._rows is None or self._model is not feature_model:
            # Kept, so that later evaluations are one matrix product without images.
            self._rows = extract_cached(
                model,
                self.dataset,
                self.store,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                collate_fn=collate_fn,
                description="evaluation features",
            )
            self._model = feature_model
        rows = self._rows
        parts = (tensor.split(self.batch_size) for tensor in (rows.features, rows.positions, rows.targets))
        return zip(*parts, strict=True)


def make_evaluators(
    config: LinearEvalConfig, training_num_classes: int, store: FeatureStore = IN_MEMORY, train_dataset: Any = None
) -> tuple[Evaluator, list[Evaluator]]:
    """Make the evaluators of the validation dataset, and of the test datasets."""
    metric_types = list(config.eval.test_metric_types) or [config.train.val_metric_type]
    if len(metric_types) == 1:
        metric_types *= len(config.eval.test_datasets)
    save = functools.partial(save_results, output_dir=config.output_dir) if config.save_results else None
    evaluators: list[Evaluator] = []
    datasets = [config.train.val_dataset, *config.eval.test_datasets]
    for dataset_str, metric_type in zip(datasets, [config.train.val_metric_type, *metric_types], strict=True):
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
                save_results_func=save,
                name_suffix=f"_{metric_type.value}" if is_second else "",
                memory_budget_mb=config.train.memory_budget_mb,
                store=store,
                train_dataset=train_dataset,
            )
        )
    return evaluators[0], evaluators[1:]


@torch.no_grad()
def score_classifiers(
    classifiers: AllClassifiers, batches: Iterable[Batch], metric: Any, class_mapping: Tensor | None = None
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Compute a metric for each classifier; every process must call it.

    Args:
        classifiers: those whose weights are not finite are left out.
        batches: this process's share of a dataset.
        metric: is cloned for each classifier.
        class_mapping: logits to keep, in their new order. Default: all.

    Returns:
        `{name: {metric: fraction}}`, and by name what the metric gives for each class, if it does.

    Raises:
        ValueError: no classifier has finite weights; names them.
    """
    metrics = {
        name: metric.clone().to(model_device(classifiers))
        for name, classifier in classifiers.classifiers_dict.items()
        if all(bool(parameter.isfinite().all()) for parameter in classifier.parameters())
    }
    if diverged := ", ".join(name for name in classifiers.names if name not in metrics):
        logger.warning("diverged, so left out: %s", diverged)
    if not metrics:
        raise ValueError(
            f"all classifiers diverged, their weights are NaN or infinite: {diverged}; train with smaller "
            "train.learning_rates"
        )
    for inputs, _, targets in batches:
        logits = _mapped(classifiers.fused.logits(inputs), class_mapping)
        for place, name in enumerate(classifiers.names):
            if name in metrics:
                metrics[name].update(preds=logits[:, place], target=targets)
    values = {name: metric.compute() for name, metric in metrics.items()}
    vectors = {name: {k: v for k, v in value.items() if v.ndim} for name, value in values.items()}
    return {name: scalar_results(metrics[name], value) for name, value in values.items()}, vectors


@torch.no_grad()
def predict(
    classifiers: AllClassifiers, name: str, batches: Iterable[Batch], class_mapping: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the logits `preds` [N, C] of a classifier, and `target`, in dataset order; every process must call it."""
    place = classifiers.names.index(name)
    accumulator = ResultsAccumulator()
    for inputs, index, targets in batches:
        accumulator.update(_mapped(classifiers.fused.logits(inputs), class_mapping)[:, place], targets, index)
    return accumulator.accumulate()


def select_best(scores: Mapping[str, float], *, lower_is_better: bool = False) -> str:
    """Return the name with the best score, the first of equal ones; NaN wins only if every score is NaN."""
    comparable = {name: score for name, score in scores.items() if score == score} or scores
    sign = -1 if lower_is_better else 1
    return max(comparable, key=lambda name: sign * comparable[name])


def format_grid(scores: Mapping[str, float], config: TrainConfig, best: str) -> str:
    """Format the scores of a grid of classifiers as a text table, with the chosen one marked.

    Args:
        scores: in percent, by name; classifiers that diverged are missing.
        config: the grid.
        best: name of the chosen one.
    """
    names = iter(_names_of_grid(config))
    columns = {n: [next(names) for _ in config.learning_rates] for n in config.n_last_blocks_list}
    heads = [f"{n} block{'s' * (n > 1)}" for n in columns]
    lines = [f"{'rate':>10}{'of 256':>10}" + "".join(f"{head:>11} " for head in heads).rstrip()]
    for place, rate in enumerate(config.learning_rates):
        line = f"{scale_lr(rate, config.batch_size):>10.3g}{rate:>10.3g}"
        for column in columns.values():
            score = scores.get(column[place])
            text = "diverged" if score is None else f"{score:.2f}"
            line += f"{text:>11}" + ("*" if column[place] == best else " ")
        lines.append(line.rstrip())
    return "\n".join(lines)


def warn_if_at_end(best: str, config: TrainConfig) -> None:
    """Warn if the chosen classifier has the largest or the smallest learning rate of several."""
    place = _names_of_grid(config).index(best) % len(config.learning_rates)
    rate = config.learning_rates[place]
    if len(config.learning_rates) > 2 and rate in (min(config.learning_rates), max(config.learning_rates)):
        end = "largest" if rate == max(config.learning_rates) else "smallest"
        logger.warning(
            f"the {end} of train.learning_rates is best, {rate:.3g} for a batch of 256: one beyond it may be better "
            "still"
        )


def _batches_of_images(model: LinearInputs, loader: Any) -> Iterator[Batch]:
    device = model_device(model)
    for images, (index, targets) in track(loader, "evaluation"):
        is_real = index >= 0  # the others pad the shares of the processes
        inputs = model(images.to(device, non_blocking=True))
        yield inputs[is_real.to(device)], index[is_real], targets[is_real].to(device)


def _mapped(logits: Tensor, class_mapping: Tensor | None) -> Tensor:
    return logits if class_mapping is None else logits[..., class_mapping.to(logits.device)]


def _names_of_grid(config: TrainConfig) -> list[str]:
    rates = [scale_lr(rate, config.batch_size) for rate in config.learning_rates]
    return classifier_names([(n, rate) for n in config.n_last_blocks_list for rate in rates])


def _read_records(path: Path) -> list[dict[str, Any]]:
    lines = path.with_name(path.name + "l")
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []


def _write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    # To `<path>l`, one JSON object per line, and to `path` in the published layout.
    with atomic_write(path.with_name(path.name + "l"), "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    with atomic_write(path, "w") as file:
        for record in records:
            best = {BEST_CLASSIFIER: {"name": record[BEST_CLASSIFIER], "accuracy": record["accuracy"]}}
            file.write(f"{record['prefix']}iter: {record['iteration']}\n{json.dumps(best)}\n\n")
