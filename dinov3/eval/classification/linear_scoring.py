"""Scores of a grid of classifiers on one dataset, and the record of them.

Notable: the inputs of the classifiers are kept after the first evaluation, if they fit into memory; later ones are one
matrix product, without images.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.eval.classification.linear_config import TrainConfig
from dinov3.eval.classification.linear_heads import AllClassifiers, LinearInputs, classifier_names, scale_lr
from dinov3.eval.classification.linear_training import inputs_fit
from dinov3.eval.classification.metrics import scalar_results
from dinov3.eval.command.progress import track
from dinov3.eval.command.results import write_atomically
from dinov3.eval.features.accumulators import ResultsAccumulator
from dinov3.eval.features.cache import FeatureCache, extract_cached
from dinov3.eval.features.extraction import FeatureRows, make_enumerated_loader, model_device

logger = logging.getLogger("dinov3")

Batch = tuple[Tensor, Tensor, Tensor]


class Scorer:
    """Scores classifiers on a dataset, as often as one likes.

    Args:
        dataset: gives (image, target).
        metric: is cloned for each classifier.
        class_mapping: logits to keep, in their new order; None: all.
        batch_size: images per step and process.
        num_workers: of the loader.
        collate_fn: as of `make_enumerated_loader`.
        memory_budget_mb: for inputs kept between evaluations.
        cache: of inputs, on disk.
    """

    def __init__(
        self,
        dataset: Any,
        metric: Any,
        *,
        class_mapping: Tensor | None,
        batch_size: int,
        num_workers: int,
        collate_fn: Any,
        memory_budget_mb: float,
        cache: FeatureCache | None,
    ) -> None:
        self.dataset = dataset
        self.metric = metric
        self.class_mapping = class_mapping
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.memory_budget_mb = memory_budget_mb
        self.cache = cache
        self._rows: FeatureRows | None = None
        self._model: nn.Module | None = None

    @torch.no_grad()
    def score(self, feature_model: Any, classifiers: AllClassifiers) -> tuple[dict[str, dict[str, float]], dict]:
        """The values of the metric for each classifier; every process must call it.

        Args:
            feature_model: gives the tokens of as many blocks as the largest classifier sees.
            classifiers: those whose weights are not finite are left out.

        Returns:
            `{name: {metric: fraction}}`, and by name what the metric gives for each class, if it does.

        Raises:
            ValueError: no classifier has finite weights; names them.
        """
        names = list(classifiers.classifiers_dict)
        finite = [name for name in names if _is_finite(classifiers.classifiers_dict[name])]
        if diverged := [name for name in names if name not in finite]:
            logger.warning("diverged, so left out: %s", ", ".join(diverged))
        if not finite:
            raise ValueError(
                f"all classifiers diverged, their weights are NaN or infinite: {', '.join(diverged)}; train with "
                "smaller train.learning_rates"
            )
        metrics = {name: self.metric.clone().to(model_device(classifiers)) for name in finite}
        for inputs, _, targets in self._batches(feature_model, classifiers):
            logits = classifiers.fused.logits(inputs)
            for place, name in enumerate(names):
                if name in metrics:
                    metrics[name].update(preds=self._mapped(logits[:, place]), target=targets)
        values = {name: metric.compute() for name, metric in metrics.items()}
        vectors = {name: {k: v for k, v in value.items() if v.ndim} for name, value in values.items()}
        return {name: scalar_results(metrics[name], value) for name, value in values.items()}, vectors

    @torch.no_grad()
    def predict(self, feature_model: Any, classifiers: AllClassifiers, name: str) -> dict[str, Tensor]:
        """`preds` [N, C], logits of one classifier, and `target`, in dataset order; every process must call it."""
        place = list(classifiers.classifiers_dict).index(name)
        accumulator = ResultsAccumulator()
        for inputs, index, targets in self._batches(feature_model, classifiers):
            accumulator.update(self._mapped(classifiers.fused.logits(inputs)[:, place]), targets, index)
        return accumulator.accumulate()

    def _mapped(self, logits: Tensor) -> Tensor:
        return logits if self.class_mapping is None else logits[:, self.class_mapping.to(logits.device)]

    def _batches(self, feature_model: Any, classifiers: AllClassifiers) -> Iterator[Batch]:
        n_blocks = max(classifier.use_n_blocks for classifier in classifiers.classifiers_dict.values())
        model = LinearInputs(feature_model, n_blocks).eval()
        if self._model is feature_model or inputs_fit(model, self.dataset, self.memory_budget_mb):
            rows = self._kept_rows(model)
            parts = (tensor.split(self.batch_size) for tensor in (rows.features, rows.positions, rows.targets))
            return zip(*parts, strict=True)
        return self._streamed(model)

    def _kept_rows(self, model: LinearInputs) -> FeatureRows:
        if self._rows is None or self._model is not model.feature_model:
            self._rows = extract_cached(
                model,
                self.dataset,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                cache=self.cache,
                collate_fn=self.collate_fn,
                description="evaluation features",
            )
            self._model = model.feature_model
        return self._rows

    def _streamed(self, model: LinearInputs) -> Iterator[Batch]:
        device = model_device(model)
        loader = make_enumerated_loader(self.dataset, self.batch_size, self.num_workers, self.collate_fn)
        for images, (index, targets) in track(loader, "evaluation"):
            real = index >= 0
            inputs = model(images.to(device, non_blocking=True))
            yield inputs[real.to(device)], index[real], targets[real].to(device)


def select_best(scores: Mapping[str, float], *, lower_is_better: bool = False) -> str:
    """The name with the best score, the first of equal ones; NaN never is the best, but where there is nothing else."""
    comparable = {name: score for name, score in scores.items() if score == score} or scores
    sign = -1 if lower_is_better else 1
    return max(comparable, key=lambda name: sign * comparable[name])


def format_grid(scores: Mapping[str, float], config: TrainConfig, best: str) -> str:
    """The scores of a grid of classifiers as a text table, the chosen one marked.

    Args:
        scores: in percent, by name; classifiers that diverged are not among them.
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


def tell_if_at_end(best: str, config: TrainConfig) -> None:
    """Warn where the chosen classifier has the largest or the smallest learning rate of several."""
    place = _names_of_grid(config).index(best) % len(config.learning_rates)
    rate = config.learning_rates[place]
    if len(config.learning_rates) > 2 and rate in (min(config.learning_rates), max(config.learning_rates)):
        which = "largest" if rate == max(config.learning_rates) else "smallest"
        logger.warning(
            "the %s of train.learning_rates is best, %.3g for a batch of 256: one beyond it may be better still",
            which,
            rate,
        )


def _names_of_grid(config: TrainConfig) -> list[str]:
    rates = [scale_lr(rate, config.batch_size) for rate in config.learning_rates]
    return classifier_names([(n, rate) for n in config.n_last_blocks_list for rate in rates])


def append_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add a record to `<path>l`, one JSON object per line, and write `path` anew in the published layout."""
    _write_records(Path(path), [*_read_records(Path(path)), dict(record)])


def drop_records(path: str | Path, *, iteration: int, prefix: str) -> None:
    """Leave out the records of one training from an iteration on."""
    records = _read_records(Path(path))
    kept = [r for r in records if r["prefix"] != prefix or r["iteration"] < iteration]
    if len(kept) < len(records):
        _write_records(Path(path), kept)


def _is_finite(module: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def _read_records(path: Path) -> list[dict[str, Any]]:
    lines = _lines_path(path)
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []


def _write_records(path: Path, records: list[dict[str, Any]]) -> None:
    write_atomically(_lines_path(path), "".join(json.dumps(record) + "\n" for record in records))
    write_atomically(path, "".join(map(_published_text, records)))


def _lines_path(path: Path) -> Path:
    return path.with_name(path.name + "l")


def _published_text(record: Mapping[str, Any]) -> str:
    best = {"best_classifier": {"name": record["best_classifier"], "accuracy": record["accuracy"]}}
    return f"{record['prefix']}iter: {record['iteration']}\n{json.dumps(best)}\n\n"
