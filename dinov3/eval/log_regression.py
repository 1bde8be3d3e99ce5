"""Logistic regression on frozen features (DINOv3, arXiv 2508.10104; the protocol is that of DINOv2).

    python dinov3/eval/log_regression.py \\
      model.config_file=RUN/config.yaml model.pretrained_weights=RUN/teacher_checkpoint.pth \\
      train.dataset=ImageFolder:root=TRAIN eval.test_dataset=ImageFolder:root=TEST output_dir=OUT

A linear classifier with an L2 penalty is fitted to the class tokens after the final norm, as they are. Its penalty is
chosen among 45 values by validation images: `train.val_dataset`, or a tenth of the training images (a hundredth with
few-shot). The final fit is on both, with few-shot only on the training images.

Notable:
- All 45 values are fitted at once, on any device (`log_regression_solvers`): many times faster than the published loop
  of scikit-learn fits, and to the same accuracy. `train.solver=SKLEARN` is that loop.
- Images go through the model once, for any number of values and few-shot tries.
- The whole sweep is reported: printed, in the JSON file, in `sweep-log-regression.csv` and as a picture.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this directory would hide the standard library's names
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.eval.classification.data import (
    ScoredDataset,
    count_classes,
    create_train_dataset_dict,
    extract_features_for_dataset_dict,
    make_scored_dataset,
    make_transform,
    open_dataset,
    read_train_labels,
    split_train_val_datasets,
)
from dinov3.eval.classification.log_regression_config import RESULTS_FILENAME, LogregEvalConfig, Solver
from dinov3.eval.classification.log_regression_module import (
    LogRegModule,
    Sweep,
    get_best_logreg_with_features,
    rows_per_batch,
)
from dinov3.eval.classification.log_regression_plot import format_sweep, sweep_table, write_sweeps
from dinov3.eval.classification.log_regression_solvers import check_sklearn
from dinov3.eval.classification.metrics import TargetKind, build_classification_metric, check_targets, scalar_results
from dinov3.eval.classification.scoring import DictKeysModule, average_metrics, evaluate, save_per_class, save_results
from dinov3.eval.command.command_line import run_command
from dinov3.eval.command.model import FrozenBackbone
from dinov3.eval.command.results import EvaluationResult
from dinov3.eval.features.cache import FeatureRows, FeatureStore
from dinov3.eval.features.extraction import extract_cached, gather_rows
from dinov3.utils.command_line import run_command_line

logger = logging.getLogger("dinov3")

VAL_SHARE, FEW_SHOT_VAL_SHARE = 0.1, 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate from the command line; see `run_command`."""
    return run_command(
        argv,
        doc=__doc__,
        config_class=LogregEvalConfig,
        evaluate=evaluate_log_regression,
        results_file=RESULTS_FILENAME,
    )


def eval_log_regression_with_model(
    *, model: nn.Module, autocast_dtype: torch.dtype, config: LogregEvalConfig
) -> dict[str, float]:
    """Run the evaluation that `config` describes on a backbone, and write its probability files.

    Args:
        model: gives the class token [B, D] for images [B, 3, H, W].
        autocast_dtype: the precision that it runs in; float32 means without autocast.
        config: datasets and settings; `config.model` is ignored.

    Returns:
        The test metrics in percent: `"top-1"`, ..., or with several tries `"top-1_mean"`, `"top-1_std"`, ...
    """
    return evaluate_log_regression(FrozenBackbone(model, autocast_dtype), config, writes_sweep=False).metrics


def evaluate_log_regression(
    backbone: FrozenBackbone, config: LogregEvalConfig, *, writes_sweep: bool = True
) -> EvaluationResult:
    """Evaluate as `config` describes, and write the sweep as a table and a picture; see the module."""
    if config.train.resolved_solver() is Solver.SKLEARN:
        check_sklearn()
    config.transform.check(backbone)
    train_dataset, val, test, num_classes = _open_datasets(config)
    few_shot = config.few_shot
    tries = create_train_dataset_dict(train_dataset, few_shot.enable, few_shot.k_or_percent, few_shot.n_tries)
    store = config.features.make_store()
    train, val_rows, test_rows = _extract(backbone, tries, val, test, config, store)
    val_labels = val_rows.targets
    if val.class_mapping is not None and val_labels.ndim == 1:
        val_labels = val.class_mapping.to(val_labels.device)[val_labels]
    sweeps, per_try = {}, {}
    for name, data in train.items():
        best = get_best_logreg_with_features(
            **data,
            val_features=val_rows.features,
            val_labels=val_labels,
            val_metric=build_classification_metric(config.train.val_metric_type, num_classes=num_classes),
            concatenate_train_val=not few_shot.enable,
            train_config=config.train,
            num_classes=num_classes,
            store=store,
        )
        assert best.sweep is not None
        sweeps[name] = best.sweep
        per_try[name] = _score_try(best, test_rows, test, config, name)
    results = per_try[0] if len(per_try) == 1 else average_metrics(per_try)
    for metric, value in results.items():
        logger.info("logistic regression %s: %.2f", metric, value)
    datasets = {
        "train": {"dataset": config.train.dataset, "images": [len(subset) for subset in tries.values()]},
        "val": {"dataset": config.train.val_dataset or config.train.dataset, "images": len(val.dataset)},
        "test": {"dataset": config.eval.test_dataset, "images": len(test.dataset)},
        "classes": num_classes,
    }
    return EvaluationResult(
        metrics=results,
        datasets=datasets,
        model=backbone.description,
        autocast_dtype=backbone.autocast_dtype,
        report=_format_report(results, config, datasets, sweeps, backbone.description),
        details={
            "chosen_C": {f"try {name}": sweep.Cs[sweep.best] for name, sweep in sweeps.items()},
            "sweep": sweep_table(sweeps),
            "solver": config.train.resolved_solver().value,
        },
        files=write_sweeps(sweeps, config.output_dir) if writes_sweep and distributed.is_main_process() else [],
    )


def _open_datasets(config: LogregEvalConfig) -> tuple[Any, ScoredDataset, ScoredDataset, int]:
    # Training, validation and test images, and the number of classes. Everything that can be wrong with the labels is
    # found here, before an image is read.
    transform = make_transform(config.transform)
    train_dataset = open_dataset(config.train.dataset, transform, "train.dataset")
    if config.train.val_dataset:
        val_dataset = open_dataset(config.train.val_dataset, transform, "train.val_dataset")
    else:
        share = FEW_SHOT_VAL_SHARE if config.few_shot.enable else VAL_SHARE
        train_dataset, val_dataset = split_train_val_datasets(train_dataset, share)
        if len(val_dataset) == 0:
            raise ValueError(
                "train.dataset has one image per class, so none can be set apart to choose C by: give train.val_dataset"
            )
    test_dataset = open_dataset(config.eval.test_dataset, transform, "eval.test_dataset")
    train_labels = read_train_labels(train_dataset)
    val_metric_type = config.train.val_metric_type
    if val_metric_type.target_kind not in (TargetKind.CLASSES, TargetKind.MULTI_HOT):
        raise ValueError(
            f"train.val_metric_type={val_metric_type.name} cannot choose C, because it needs "
            f"{val_metric_type.target_kind.value}; it can be eval.test_metric_type"
        )
    check_targets(val_metric_type, train_labels, "train.dataset")
    num_classes = count_classes(train_labels)
    make_scored = functools.partial(
        make_scored_dataset, train_dataset=train_dataset, num_classes=num_classes, train_labels=train_labels
    )
    val = make_scored(val_dataset, val_metric_type, name="train.val_dataset")
    test = make_scored(test_dataset, config.resolved_test_metric_type(), name="eval.test_dataset")
    return train_dataset, val, test, num_classes


def _extract(
    backbone: FrozenBackbone,
    tries: Mapping[int, Any],
    val: ScoredDataset,
    test: ScoredDataset,
    config: LogregEvalConfig,
    store: FeatureStore,
) -> tuple[dict[int, dict[str, Tensor]], FeatureRows, FeatureRows]:
    # All training features by try, all validation features, and this process's share of the test features.
    on_cpu = config.train.train_features_device == "cpu"
    batch_size, num_workers = config.train.batch_size, config.train.num_workers
    extract = functools.partial(extract_cached, backbone.model, store=store, on_cpu=on_cpu)
    with backbone.autocast():
        train = extract_features_for_dataset_dict(backbone.model, tries, batch_size, num_workers, on_cpu, store=store)
        val_rows = extract(
            val.dataset, batch_size=batch_size, num_workers=num_workers, description="validation features"
        )
        test_rows = extract(
            test.dataset,
            batch_size=config.eval.batch_size or batch_size,
            num_workers=config.eval.num_workers,
            collate_fn=test.collate_fn,
            description="test features",
        )
    return train, gather_rows(val_rows, store), test_rows


def _score_try(
    model: LogRegModule, rows: FeatureRows, test: ScoredDataset, config: LogregEvalConfig, name: int
) -> dict[str, float]:
    # The metrics in percent; writes the files of the try.
    suffix = None if config.few_shot.n_tries == 1 else name
    metric = test.metric.clone()
    values, scores = evaluate_logreg_model(
        logreg_model=model,
        test_rows=rows,
        metric=metric,
        class_mapping=test.class_mapping,
        keep_scores=config.save_results,
    )
    if scores is not None:
        save_results(**scores, output_dir=config.output_dir, filename_suffix=suffix)
    save_per_class(values, config.output_dir, config.eval.test_dataset, "" if suffix is None else f"_{suffix}")
    return {key: 100 * value for key, value in scalar_results(metric, values).items()}


def evaluate_logreg_model(
    *,
    logreg_model: LogRegModule,
    test_rows: FeatureRows,
    metric: Any,
    class_mapping: Tensor | None = None,
    keep_scores: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Score a fitted model; every process must call it.

    Args:
        logreg_model: fitted.
        test_rows: the features of this process's share of the test images.
        metric: updated.
        class_mapping: int64, the training class of each scored class. Default: all training classes.
        keep_scores: also return the probabilities and targets of all images.

    Returns:
        The values of the metric, fractions; and probabilities `preds` [M, C] and `target` in dataset order, or None.
    """
    size = rows_per_batch(len(logreg_model.constant[0]))
    parts = (tensor.split(size) for tensor in (test_rows.features, test_rows.positions, test_rows.targets))
    metrics, outputs = evaluate(
        model=logreg_model,
        data_loader=[(features, (index, targets)) for features, index, targets in zip(*parts, strict=True)],
        postprocessors={"": DictKeysModule(["preds"], class_mapping)},
        metrics={"": metric},
        device=test_rows.features.device,
        accumulate_results=keep_scores,
    )
    return metrics[""], outputs[""]


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
        f"logistic regression, {config.resolved_test_metric_type().value}, {model}",
        f"{n_train} training images, {datasets['val']['images']} validation images, "
        f"{datasets['test']['images']} test images, {datasets['classes']} classes, C = {chosen}",
    ]
    if len(sweeps) == 1:
        lines.append(format_sweep(next(iter(sweeps.values()))))
    lines += [f"{name:>10}{value:>11.2f}" for name, value in results.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command_line(main)
