"""Logistic regression on frozen features (DINOv3, arXiv 2508.10104; the protocol is that of DINOv2).

    python dinov3/eval/log_regression.py \\
      model.config_file=RUN/config.yaml model.pretrained_weights=RUN/teacher_checkpoint.pth \\
      train.dataset=ImageFolder:root=TRAIN eval.test_dataset=ImageFolder:root=TEST output_dir=OUT

A linear classifier with an L2 penalty is fitted to the class tokens after the final norm, as they are. Its penalty is
chosen among 45 values by validation images: `train.val_dataset`, or a tenth of the training images (a hundredth with
few-shot). The final fit is on both, with few-shot on the training images alone.

Notable:
- All 45 values are fitted at once, on any device (`log_regression_solvers`): many times faster than the published loop
  of scikit-learn fits, and to the same accuracy. `train.solver=SKLEARN` is that loop.
- Images go through the model once, however many values and few-shot tries there are.
- The whole sweep is reported: printed, in the JSON file, in `sweep-log-regression.csv` and as a picture.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this directory would hide the standard library's names
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from dinov3 import distributed
from dinov3.data import make_classification_eval_transform, make_dataset
from dinov3.data.transforms import get_target_transform
from dinov3.eval.classification.config import FewShotConfig, TransformConfig
from dinov3.eval.classification.data import (
    check_class_mapping,
    check_test_labels,
    create_train_dataset_dict,
    extract_features_for_dataset_dict,
    find_class_mapping,
    get_labels,
    pad_multilabel_and_collate,
    split_train_val_datasets,
)
from dinov3.eval.classification.log_regression_config import (
    EvalConfig,
    LogregEvalConfig,
    LogregTransformConfig,
    Solver,
    TrainConfig,
)
from dinov3.eval.classification.log_regression_module import (
    C_POWER_RANGE,
    LogRegModule,
    Sweep,
    check_several_classes,
    get_best_logreg_with_features,
    rows_per_batch,
    sweep_C_values,
    train_for_C,
)
from dinov3.eval.classification.log_regression_plot import format_sweep, sweep_table, write_sweeps
from dinov3.eval.classification.log_regression_solvers import check_sklearn
from dinov3.eval.classification.metrics import (
    ClassificationMetricType,
    TargetKind,
    build_classification_metric,
    check_targets,
    scalar_results,
)
from dinov3.eval.classification.scoring import average_metrics, evaluate, save_per_class, save_results
from dinov3.eval.command.command_line import run_command
from dinov3.eval.command.model import FrozenBackbone
from dinov3.eval.command.results import EvaluationResult
from dinov3.eval.features.cache import extract_cached
from dinov3.eval.features.extraction import FeatureRows, gather_rows, make_enumerated_loader
from dinov3.utils.command_line import run_command_line

__all__ = [
    "C_POWER_RANGE",
    "MAIN_METRICS",
    "RESULTS_FILENAME",
    "EvalConfig",
    "FewShotConfig",
    "LogRegModule",
    "LogregEvalConfig",
    "LogregTransformConfig",
    "Solver",
    "Sweep",
    "TrainConfig",
    "TransformConfig",
    "eval_log_regression_with_model",
    "evaluate_logreg_model",
    "get_best_logreg_with_features",
    "main",
    "make_logreg_data_loader",
    "make_train_val_datasets",
    "make_transform",
    "sweep_C_values",
    "train_for_C",
]

logger = logging.getLogger("dinov3")

RESULTS_FILENAME = "results-log-regression.csv"
MAIN_METRICS = ["top-1(_mean)?"]
VAL_SHARE, FEW_SHOT_VAL_SHARE = 0.1, 0.01


def make_transform(config: TransformConfig) -> Any:
    """Resize the short side, crop the centre, normalise; warns where that crops, which is not customary here."""
    if config.resize_size != config.crop_size:
        logger.warning("transform: resize to %d and crop %d; customary is 1:1", config.resize_size, config.crop_size)
    return make_classification_eval_transform(
        resize_size=config.resize_size, crop_size=config.crop_size, mean=config.mean, std=config.std
    )


def make_train_val_datasets(config: LogregEvalConfig, transform: Any) -> tuple[Any, Any]:
    """The training and validation images: those named, or a division of the training images."""
    train_dataset = _make_dataset(config.train.dataset, transform)
    _check_not_empty("train.dataset", train_dataset)
    if config.train.val_dataset:
        val_dataset = _make_dataset(config.train.val_dataset, transform)
        _check_not_empty("train.val_dataset", val_dataset)
        return train_dataset, val_dataset
    share = FEW_SHOT_VAL_SHARE if config.few_shot.enable else VAL_SHARE
    train_dataset, val_dataset = split_train_val_datasets(train_dataset, share)
    if len(val_dataset) == 0:
        raise ValueError(
            "train.dataset has one image per class, so none can be set apart to choose C by: give train.val_dataset"
        )
    return train_dataset, val_dataset


def make_logreg_data_loader(
    dataset: Any, *, batch_size: int, num_workers: int, metric_type: ClassificationMetricType
) -> Any:
    """A loader of `(images, (index, targets))` of this process's share, padded with index -1, as the metric needs."""
    return make_enumerated_loader(dataset, batch_size, num_workers, _collate_fn(metric_type))


def evaluate_logreg_model(
    *,
    logreg_model: LogRegModule,
    test_rows: FeatureRows,
    metric: Any,
    class_mapping: Tensor | None = None,
    save_results_func: Callable[..., None] | None = None,
) -> dict[str, Tensor]:
    """Score a fitted model; every process must call it.

    Args:
        logreg_model: fitted.
        test_rows: the features of this process's share of the test images.
        metric: updated.
        class_mapping: int64, the training class of each test class; None: they are the same.
        save_results_func: called with probabilities [M, C] and targets.

    Returns:
        What the metric computes, fractions.
    """
    size = rows_per_batch(len(logreg_model.constant[0]))
    parts = (tensor.split(size) for tensor in (test_rows.features, test_rows.positions, test_rows.targets))
    _, metrics, outputs = evaluate(
        model=logreg_model,
        data_loader=[(features, (index, targets)) for features, index, targets in zip(*parts, strict=True)],
        postprocessors={"": _Probabilities(class_mapping)},
        metrics={"": metric},
        device=test_rows.features.device,
        accumulate_results=save_results_func is not None,
    )
    if save_results_func is not None and outputs[""] is not None:
        save_results_func(**outputs[""])
    return metrics[""]


def eval_log_regression_with_model(
    *, model: nn.Module, autocast_dtype: torch.dtype, config: LogregEvalConfig
) -> dict[str, float]:
    """Run the evaluation that `config` describes on a backbone, and write its probability files.

    Args:
        model: gives the class token [B, D] for images [B, 3, H, W].
        autocast_dtype: what it runs in; float32 means float32.
        config: datasets and settings; `config.model` is not looked at.

    Returns:
        The test metrics in percent: `"top-1"`, ..., or with several tries `"top-1_mean"`, `"top-1_std"`, ...
    """
    return _score(FrozenBackbone(model, autocast_dtype), config)[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate from the command line; see `run_command`."""
    return run_command(
        argv,
        doc=__doc__,
        config_class=LogregEvalConfig,
        evaluate=evaluate_log_regression,
        results_file=RESULTS_FILENAME,
    )


class _Probabilities(nn.Module):
    def __init__(self, class_mapping: Tensor | None) -> None:
        super().__init__()
        self.class_mapping = class_mapping

    def forward(self, outputs: dict[str, Any], targets: Tensor) -> dict[str, Tensor]:
        preds = outputs["preds"]
        if self.class_mapping is not None:
            preds = preds[:, self.class_mapping.to(preds.device)]
        return {"preds": preds, "target": targets}


def evaluate_log_regression(backbone: FrozenBackbone, config: LogregEvalConfig) -> EvaluationResult:
    """Evaluate as `config` describes, and write the sweep as a table and a picture; see the module."""
    results, datasets, sweeps = _score(backbone, config)
    details = {
        "chosen_C": {f"try {name}": sweep.Cs[sweep.best] for name, sweep in sweeps.items()},
        "sweep": sweep_table(sweeps),
        "solver": config.train.resolved_solver().value,
    }
    return EvaluationResult(
        metrics=results,
        datasets=datasets,
        model=backbone.description,
        autocast_dtype=backbone.autocast_dtype,
        report=_format_report(results, config, datasets, sweeps, backbone.description),
        details=details,
        files=write_sweeps(sweeps, config.output_dir) if distributed.is_main_process() else [],
    )


def _score(
    backbone: FrozenBackbone, config: LogregEvalConfig
) -> tuple[dict[str, float], dict[str, Any], dict[int, Sweep]]:
    if config.train.resolved_solver() is Solver.SKLEARN:
        check_sklearn()
    config.transform.check(backbone)
    transform = make_transform(config.transform)
    train_dataset, val_dataset = make_train_val_datasets(config, transform)
    test_dataset = _make_dataset(config.eval.test_dataset, transform)
    _check_not_empty("eval.test_dataset", test_dataset)
    num_classes, val_mapping, test_mapping = _check_labels(train_dataset, val_dataset, test_dataset, config)
    val_metric = build_classification_metric(config.train.val_metric_type, num_classes=num_classes)
    test_metric = build_classification_metric(
        _test_metric_type(config),
        num_classes=num_classes if test_mapping is None else len(test_mapping),
        dataset=test_dataset,
    )
    few_shot = config.few_shot
    tries = create_train_dataset_dict(train_dataset, few_shot.enable, few_shot.k_or_percent, few_shot.n_tries)
    with backbone.autocast():
        train, val_rows, test_rows = _extract(backbone.model, tries, val_dataset, test_dataset, config)
    val_labels = val_rows.targets
    if val_mapping is not None and val_labels.ndim == 1:
        val_labels = val_mapping.to(val_labels.device)[val_labels]
    sweeps, per_try = {}, {}
    for name, data in train.items():
        best = get_best_logreg_with_features(
            **data,
            val_features=val_rows.features,
            val_labels=val_labels,
            val_metric=val_metric,
            concatenate_train_val=not few_shot.enable,
            train_config=config.train,
            num_classes=num_classes,
            spill=config.features.make_spill(),
        )
        assert best.sweep is not None
        sweeps[name] = best.sweep
        per_try[name] = _test(best, test_rows, test_metric.clone(), test_mapping, config, name)
    results = per_try[0] if len(per_try) == 1 else average_metrics(per_try)
    for metric, value in results.items():
        logger.info("logistic regression %s: %.2f", metric, value)
    datasets = {
        "train": {"dataset": config.train.dataset, "images": [len(subset) for subset in tries.values()]},
        "val": {"dataset": config.train.val_dataset or config.train.dataset, "images": len(val_dataset)},
        "test": {"dataset": config.eval.test_dataset, "images": len(test_dataset)},
        "classes": num_classes,
    }
    return results, datasets, sweeps


def _make_dataset(dataset_str: str, transform: Any) -> Any:
    return make_dataset(
        dataset_str=dataset_str, transform=transform, target_transform=get_target_transform(dataset_str)
    )


def _check_not_empty(name: str, dataset: Any) -> None:
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty")


def _check_labels(
    train_dataset: Any, val_dataset: Any, test_dataset: Any, config: LogregEvalConfig
) -> tuple[int, Tensor | None, Tensor | None]:
    # Everything about the labels that can go wrong, before an image is read. Returns the number of classes, and which
    # of them the validation and test sets have, if not all.
    train_labels = get_labels(train_dataset)
    check_several_classes(train_labels)
    num_classes = int(train_labels.max()) + 1 if train_labels.ndim == 1 else train_labels.shape[1]
    if config.train.val_metric_type.target_kind not in (TargetKind.CLASSES, TargetKind.MULTI_HOT):
        raise ValueError(
            f"train.val_metric_type={config.train.val_metric_type.name} cannot choose C, because it needs "
            f"{config.train.val_metric_type.target_kind.value}; it can be eval.test_metric_type"
        )
    check_targets(config.train.val_metric_type, train_labels, "train.dataset")
    mappings = []
    for name, dataset, metric_type in (
        ("train.val_dataset", val_dataset, config.train.val_metric_type),
        ("eval.test_dataset", test_dataset, _test_metric_type(config)),
    ):
        mapping = find_class_mapping(_whole(train_dataset), _whole(dataset), name)
        check_class_mapping(mapping, num_classes, name)
        mappings.append(mapping)
        n_columns = num_classes if mapping is None else len(mapping)
        labels = check_test_labels(dataset, metric_type, n_columns, name)
        if labels is not None and labels.ndim == 1:
            _tell_unknown(name, labels if mapping is None else mapping[labels], train_labels)
    return num_classes, mappings[0], mappings[1]


def _tell_unknown(name: str, labels: Tensor, train_labels: Tensor) -> None:
    unknown = sorted(set(labels.tolist()) - set(train_labels.tolist()))
    if unknown:
        logger.warning(
            "%s has %d classes without a training image (first: %d), they count as wrong",
            name,
            len(unknown),
            unknown[0],
        )


def _whole(dataset: Any) -> Any:
    return dataset.dataset if isinstance(dataset, Subset) else dataset


def _test_metric_type(config: LogregEvalConfig) -> ClassificationMetricType:
    return config.eval.test_metric_type or config.train.val_metric_type


def _collate_fn(metric_type: ClassificationMetricType) -> Any:
    return pad_multilabel_and_collate if metric_type.target_kind is TargetKind.LISTS else None


def _extract(
    model: nn.Module, tries: Mapping[int, Any], val_dataset: Any, test_dataset: Any, config: LogregEvalConfig
) -> tuple[dict[int, dict[str, Tensor]], FeatureRows, FeatureRows]:
    # Training features by try and validation features, whole; and this process's share of the test features.
    cache, spill = config.features.make_cache(), config.features.make_spill()
    on_cpu = config.train.train_features_device == "cpu"
    batch_size, num_workers = config.train.batch_size, config.train.num_workers
    train = extract_features_for_dataset_dict(model, tries, batch_size, num_workers, on_cpu, cache=cache, spill=spill)
    val_rows = extract_cached(
        model,
        val_dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        cache=cache,
        on_cpu=on_cpu,
        description="validation features",
        spill=spill,
    )
    test_rows = extract_cached(
        model,
        test_dataset,
        batch_size=config.eval.batch_size or batch_size,
        num_workers=config.eval.num_workers,
        cache=cache,
        on_cpu=on_cpu,
        collate_fn=_collate_fn(_test_metric_type(config)),
        description="test features",
        spill=spill,
    )
    return train, gather_rows(val_rows, spill), test_rows


def _test(
    model: LogRegModule,
    rows: FeatureRows,
    metric: Any,
    class_mapping: Tensor | None,
    config: LogregEvalConfig,
    name: int,
) -> dict[str, float]:
    suffix = None if config.few_shot.n_tries == 1 else name
    save = functools.partial(save_results, output_dir=config.output_dir, filename_suffix=suffix)
    values = evaluate_logreg_model(
        logreg_model=model,
        test_rows=rows,
        metric=metric,
        class_mapping=class_mapping,
        save_results_func=save if config.save_results else None,
    )
    save_per_class(values, config.output_dir, config.eval.test_dataset, "" if suffix is None else f"_{suffix}")
    return {key: 100 * value for key, value in scalar_results(metric, values).items()}


def _format_report(
    results: Mapping[str, float],
    config: LogregEvalConfig,
    datasets: Mapping[str, Any],
    sweeps: Mapping[int, Sweep],
    model: str,
) -> str:
    n_train = "/".join(str(n) for n in sorted(set(datasets["train"]["images"])))
    chosen = ", ".join(f"{sweep.Cs[sweep.best]:.3g}" for sweep in sweeps.values())
    lines = [
        f"logistic regression, {_test_metric_type(config).value}, {model}",
        f"{n_train} training images, {datasets['val']['images']} validation images, "
        f"{datasets['test']['images']} test images, {datasets['classes']} classes, C = {chosen}",
    ]
    if len(sweeps) == 1:
        lines.append(format_sweep(next(iter(sweeps.values()))))
    lines += [f"{name:>10}{value:>11.2f}" for name, value in results.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command_line(main)
