"""k-NN classification of frozen features (DINOv3, arXiv 2508.10104, evaluation protocol; the vote is that of DINO).

    python dinov3/eval/knn.py model.config_file=RUN/config.yaml model.pretrained_weights=RUN/teacher_checkpoint.pth \\
      train.dataset=ImageFolder:root=TRAIN eval.test_dataset=ImageFolder:root=TEST output_dir=OUT

Each test image takes the class with the largest sum of weights among its k most similar training images. Similarity is
the cosine of the class tokens after the final norm, or with `eval.feature=patch_mean` of the means of the patch tokens
after the final norm; weights are a softmax of similarity / temperature over the largest k asked for.

Notable:
- Images go through the model once, however many tries and values of k there are.
- The search (`neighbours`) is exact, in float32 whatever the model runs in, and within a memory budget. Equal
  similarities go to the lower training index, so results do not depend on batch sizes or on the number of processes.
- `KnnModule` and `knn_accuracy` work on features from anywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this directory would hide the standard library's names
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.data import make_classification_eval_transform, make_dataset
from dinov3.eval.classification.config import FewShotConfig, TransformConfig
from dinov3.eval.classification.data import (
    check_class_mapping,
    check_test_labels,
    create_train_dataset_dict,
    extract_features_for_dataset_dict,
    find_class_mapping,
    get_labels,
    pad_multilabel_and_collate,
)
from dinov3.eval.classification.knn_config import EvalConfig, Feature, KnnEvalConfig, TrainConfig
from dinov3.eval.classification.knn_module import KnnModule, blocks_of_slowest_process, knn_accuracy, split_rows
from dinov3.eval.classification.metrics import (
    ClassificationMetricType,
    TargetKind,
    build_classification_metric,
    scalar_results,
)
from dinov3.eval.classification.neighbours_faiss import choose_backend
from dinov3.eval.classification.scoring import (
    ModelWithPatchMean,
    average_metrics,
    evaluate,
    save_per_class,
    save_results,
    wrap_model,
)
from dinov3.eval.command.command_line import run_command
from dinov3.eval.command.model import FrozenBackbone
from dinov3.eval.command.progress import track
from dinov3.eval.command.results import EvaluationResult, write_atomically
from dinov3.eval.features.cache import extract_cached
from dinov3.eval.features.extraction import FeatureRows, extract_rows, make_enumerated_loader, model_device
from dinov3.utils import as_torch_dtype
from dinov3.utils.command_line import run_command_line

__all__ = [
    "MAIN_METRICS",
    "RESULTS_FILENAME",
    "DictKeysModule",
    "EvalConfig",
    "Feature",
    "FewShotConfig",
    "KnnEvalConfig",
    "KnnModule",
    "TrainConfig",
    "TransformConfig",
    "eval_knn",
    "eval_knn_with_model",
    "knn_accuracy",
    "main",
    "make_test_data_loader",
    "make_transform",
]

logger = logging.getLogger("dinov3")

RESULTS_FILENAME = "results-knn.csv"
MAIN_METRICS = [".* Top 1"]
LINES_FILENAME = "results_eval_knn.json"


class DictKeysModule(nn.Module):
    """Postprocessor that takes the entry at a path of keys for the predictions.

    Args:
        keys: the path.
        class_mapping: int64, columns of the predictions to keep, in their new order; None: all.
    """

    def __init__(self, keys: Sequence[Any], class_mapping: Tensor | None = None) -> None:
        super().__init__()
        self.keys = keys
        self.class_mapping = class_mapping

    def forward(self, features_dict: Any, targets: Tensor) -> dict[str, Tensor]:
        """`{"preds": features_dict[key][key]..., "target": targets}`."""
        for name in self.keys:
            features_dict = features_dict[name]
        if self.class_mapping is not None:
            features_dict = features_dict[:, self.class_mapping.to(features_dict.device)]
        return {"preds": features_dict, "target": targets}


def make_transform(config: TransformConfig) -> Any:
    """Resize the short side, crop the centre, normalise; warns where that crops more or less than customary."""
    if abs(config.resize_size - config.crop_size * 256 / 224) > 1:
        logger.warning("transform: resize to %d and crop %d; customary is 8:7", config.resize_size, config.crop_size)
    return make_classification_eval_transform(
        resize_size=config.resize_size, crop_size=config.crop_size, mean=config.mean, std=config.std
    )


def make_test_data_loader(dataset: Any, *, batch_size: int, num_workers: int) -> Any:
    """A loader of `(images, (index, targets))` of this process's share of the test images, padded with index -1."""
    return make_enumerated_loader(dataset, batch_size, num_workers)


def eval_knn(
    *,
    model: nn.Module,
    train_data_dict: Mapping[int, Mapping[str, Tensor]],
    test_data_loader: Any,
    metric_collection: Any,
    knn_config: TrainConfig,
    num_classes: int,
    save_results_func: Callable[..., None] | None = None,
    save_per_class_func: Callable[[Mapping[str, Tensor], str], None] | None = None,
    test_rows: FeatureRows | None = None,
    class_mapping: Tensor | None = None,
    stream: bool = False,
) -> dict[int, dict[str, float]]:
    """Classify the test images by the training features of each try.

    Args:
        model: gives [B, D] for a batch of images; each test image goes through it once.
        train_data_dict: by try, as of `extract_features_for_dataset_dict`.
        test_data_loader: as of `make_test_data_loader`.
        metric_collection: updated and computed in copies.
        knn_config: `ks` and the settings of the vote.
        num_classes: C.
        save_results_func: called with scores [M, C], targets and `filename_suffix`, per try and k.
        save_per_class_func: called with the values of the metric, as fractions, and a suffix, per try and k.
        test_rows: this process's features of the test images; None: extract them from the loader's.
        class_mapping: int64, the training class of each test class; None: they are the same.
        stream: leave training features where they are, and bring them to the model's device block by block.

    Returns:
        Metrics in percent by k; with several tries their `<metric>_mean` and `<metric>_std`.
    """
    device = model_device(model)
    if test_rows is None:
        test_rows = extract_rows(model, test_data_loader, description="test features")
    tries: dict[int, dict[int, dict[str, float]]] = {}
    for name, train_data in train_data_dict.items():
        module = _make_module(train_data, device, knn_config, num_classes, stream)
        metrics = {k: metric_collection.clone() for k in module.ks}
        _, values, outputs = evaluate(
            model=module,
            data_loader=track(_feature_batches(test_rows, module.queries_per_block), "nearest neighbours"),
            postprocessors={k: DictKeysModule([k], class_mapping) for k in module.ks},
            metrics=metrics,
            device=device,
            accumulate_results=save_results_func is not None,
        )
        fractions = {k: scalar_results(metrics[k], value) for k, value in values.items()}
        tries[name] = {k: {metric: 100 * v for metric, v in value.items()} for k, value in fractions.items()}
        for k, output in outputs.items():
            suffix = f"k_{k}" if len(train_data_dict) == 1 else f"try_{name}_k_{k}"
            if save_per_class_func is not None:
                save_per_class_func(values[k], f"_{suffix}")
            if save_results_func is not None and output is not None:
                save_results_func(**output, filename_suffix=suffix)
    if len(tries) == 1:
        return next(iter(tries.values()))
    ks = sorted({k for results in tries.values() for k in results})
    return {k: average_metrics({name: results[k] for name, results in tries.items() if k in results}) for k in ks}


def eval_knn_with_model(*, model: nn.Module, autocast_dtype: torch.dtype, config: KnnEvalConfig) -> dict[str, float]:
    """Run the evaluation that `config` describes on a backbone, and write its line and score files.

    Args:
        model: gives the class token [B, D] for images [B, 3, H, W].
        autocast_dtype: what it runs in; float32 means float32.
        config: datasets and settings; `config.model` is not looked at.

    Returns:
        The results table: `"<k> Top 1"`, ... in percent.
    """
    return evaluate_knn(FrozenBackbone(model, autocast_dtype), config).metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate from the command line; see `run_command`."""
    return run_command(
        argv, doc=__doc__, config_class=KnnEvalConfig, evaluate=evaluate_knn, results_file=RESULTS_FILENAME
    )


def evaluate_knn(backbone: FrozenBackbone, config: KnnEvalConfig) -> EvaluationResult:
    """Evaluate as `config` describes; see the module."""
    config.transform.check(backbone)
    model = backbone.model
    transform = make_transform(config.transform)
    train_dataset, test_dataset = (
        make_dataset(dataset_str=text, transform=transform, target_transform=None)
        for text in (config.train.dataset, config.eval.test_dataset)
    )
    choose_backend(config.train.backend, model_device(model), as_torch_dtype(config.train.similarity_dtype))
    metric_type = config.eval.test_metric_type
    num_classes, class_mapping = _check_datasets(train_dataset, test_dataset, metric_type)
    metric = build_classification_metric(
        metric_type,
        num_classes=num_classes if class_mapping is None else len(class_mapping),
        dataset=test_dataset,
    )
    cache, spill = config.features.make_cache(), config.features.make_spill()
    model = ModelWithPatchMean(model) if config.eval.feature is Feature.PATCH_MEAN else model
    model = wrap_model(model, normalize=True)
    few_shot = config.few_shot
    tries = create_train_dataset_dict(train_dataset, few_shot.enable, few_shot.k_or_percent, few_shot.n_tries)
    with backbone.autocast():
        train_data_dict = extract_features_for_dataset_dict(
            model,
            tries,
            config.train.batch_size,
            config.train.num_workers,
            gather_on_cpu=True,
            shard_above_bytes=int(config.train.memory_budget_mb * 2**20),
            cache=cache,
            spill=spill,
        )
        test_rows = extract_cached(
            model,
            test_dataset,
            batch_size=config.eval.batch_size or config.train.batch_size,
            num_workers=config.eval.num_workers,
            cache=cache,
            collate_fn=pad_multilabel_and_collate if metric_type.target_kind is TargetKind.LISTS else None,
            description="test features",
            spill=spill,
        )
        per_k = eval_knn(
            model=model,
            train_data_dict=train_data_dict,
            test_data_loader=(),
            test_rows=test_rows,
            metric_collection=metric,
            knn_config=config.train,
            num_classes=num_classes,
            save_results_func=functools.partial(save_results, output_dir=config.output_dir)
            if config.save_results
            else None,
            save_per_class_func=lambda values, suffix: save_per_class(
                values, config.output_dir, config.eval.test_dataset, suffix
            ),
            class_mapping=class_mapping,
            stream=spill.takes(len(train_dataset), test_rows.features.shape[1]),
        )
    results = _log_and_format_results_dict(per_k, few_shot.n_tries)
    _write_lines(results, config.output_dir)
    datasets = {
        "train": {"dataset": config.train.dataset, "images": [len(subset) for subset in tries.values()]},
        "test": {"dataset": config.eval.test_dataset, "images": len(test_dataset)},
        "classes": num_classes,
    }
    return EvaluationResult(
        metrics=results,
        datasets=datasets,
        model=backbone.description,
        autocast_dtype=backbone.autocast_dtype,
        report=_format_table(results, config, datasets, backbone.description),
    )


def _check_datasets(
    train_dataset: Any, test_dataset: Any, metric_type: ClassificationMetricType
) -> tuple[int, Tensor | None]:
    # The number of training classes, and which of them the test set has, if not all.
    for name, dataset in (("train.dataset", train_dataset), ("eval.test_dataset", test_dataset)):
        if len(dataset) == 0:
            raise ValueError(f"{name} is empty")
    class_mapping = find_class_mapping(train_dataset, test_dataset, "eval.test_dataset")
    train_labels = get_labels(train_dataset)
    if train_labels.ndim == 1 and int(train_labels.min()) == int(train_labels.max()):
        raise ValueError(
            f"train.dataset has images of a single class, {int(train_labels[0])}: there is nothing to tell apart"
        )
    num_classes = int(train_labels.max()) + 1 if train_labels.ndim == 1 else train_labels.shape[1]
    check_class_mapping(class_mapping, num_classes, "eval.test_dataset")
    n_columns = num_classes if class_mapping is None else len(class_mapping)
    check_test_labels(test_dataset, metric_type, n_columns, "eval.test_dataset")
    return num_classes, class_mapping


def _make_module(
    train_data: Mapping[str, Tensor], device: torch.device, config: TrainConfig, num_classes: int, stream: bool
) -> KnnModule:
    n_train = len(train_data["train_labels"])
    ks = sorted({min(k, n_train) for k in config.ks})
    if ks[-1] < max(config.ks):
        logger.info("train.ks=%s: there are only %d training images, using %s", list(config.ks), n_train, ks)
    return KnnModule(
        train_features=train_data["train_features"],
        train_labels=train_data["train_labels"],
        row_ids=train_data.get("train_rows"),
        device=device,
        ks=ks,
        T=config.temperature,
        num_classes=num_classes,
        skip_first_nn=config.skip_first_nn,
        memory_budget_mb=config.memory_budget_mb,
        similarity_dtype=as_torch_dtype(config.similarity_dtype),
        backend=config.backend,
        stream=stream,
    )


def _feature_batches(rows: FeatureRows, size: int) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
    # As a loader gives them, the same number in every process.
    n_blocks = blocks_of_slowest_process(len(rows.positions), size)
    parts = (split_rows(t, size, n_blocks) for t in (rows.features, rows.positions, rows.targets))
    return [(features, (index, targets)) for features, index, targets in zip(*parts, strict=True)]


def _log_and_format_results_dict(per_k: Mapping[int, Mapping[str, float]], n_tries: int) -> dict[str, float]:
    # Published columns first: those of the means, for all k; then those of groups of images; then standard deviations.
    published = ("top-1", "top-5")
    columns = {}
    for suffix, title in (("_mean", ""), ("_std", " std")) if n_tries > 1 else (("", ""),):
        found = dict.fromkeys(
            name.removesuffix(suffix) for values in per_k.values() for name in values if name.endswith(suffix)
        )
        for names in (published, [name for name in found if name not in published]):
            for k in sorted(per_k):
                for name in names:
                    if name + suffix in per_k[k]:
                        columns[f"{k} {name.replace('top-', 'Top ')}{title}"] = per_k[k][name + suffix]
    for name, value in columns.items():
        logger.info("k-NN %s: %.2f", name, value)
    return columns


def _write_lines(results: Mapping[str, float], output_dir: str) -> None:
    if distributed.is_main_process():
        lines = [f'{{"{name}": {value}}}\n' for name, value in results.items() if not name.endswith(" std")]
        write_atomically(Path(output_dir) / LINES_FILENAME, "".join(lines))


def _format_table(results: Mapping[str, float], config: KnnEvalConfig, datasets: Mapping[str, Any], model: str) -> str:
    ks = sorted({int(name.split(" ")[0]) for name in results})
    titles = dict.fromkeys(name.split(" ", 1)[1] for name in results)
    widths = {title: max(11, len(title) + 2) for title in titles}
    n_train = "/".join(str(n) for n in sorted(set(datasets["train"]["images"])))
    lines = [
        f"k-NN, {config.eval.test_metric_type.value}, feature {config.eval.feature.value}, {model}",
        f"{n_train} training images, {datasets['test']['images']} test images, {datasets['classes']} classes",
        f"{'k':>6}" + "".join(f"{title:>{width}}" for title, width in widths.items()),
    ]
    for k in ks:
        cells = (f"{results.get(f'{k} {title}', math.nan):>{width}.2f}" for title, width in widths.items())
        lines.append(f"{k:>6}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    run_command_line(main)
