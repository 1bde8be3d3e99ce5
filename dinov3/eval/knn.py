"""k-NN classification of frozen features (DINOv3, arXiv 2508.10104, evaluation protocol; the vote is that of DINO).

    python dinov3/eval/knn.py model.config_file=RUN/config.yaml model.pretrained_weights=RUN/teacher_checkpoint.pth \\
      train.dataset=ImageFolder:root=TRAIN eval.test_dataset=ImageFolder:root=TEST output_dir=OUT

Each test image takes the class with the largest sum of weights among its k most similar training images. Similarity is
the cosine of the class tokens after the final norm, or with `eval.feature=patch_mean` that of the means of the patch
tokens after the final norm; weights are a softmax of similarity / temperature over the largest k asked for.

Notable:
- Images go through the model once, for any number of tries and values of k.
- The search (`neighbours`) is exact, in float32 whatever the model runs in, and within a memory budget. Equal
  similarities go to the lower training index, so results do not depend on batch sizes or on the number of processes.
- `KnnModule` and `knn_accuracy` (`classification.knn_module`) work on features from anywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this directory would hide the standard library's names
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
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
)
from dinov3.eval.classification.knn_config import RESULTS_FILENAME, Feature, KnnEvalConfig, TrainConfig
from dinov3.eval.classification.knn_module import score_features
from dinov3.eval.classification.scoring import ModelWithPatchMean, save_per_class, save_results, wrap_model
from dinov3.eval.command.command_line import run_command
from dinov3.eval.command.model import FrozenBackbone
from dinov3.eval.command.results import EvaluationResult
from dinov3.eval.features.cache import FeatureRows, FeatureStore, model_device
from dinov3.eval.features.extraction import extract_cached, extract_rows
from dinov3.utils.command_line import run_command_line
from dinov3.utils.files import atomic_write

logger = logging.getLogger("dinov3")

LINES_FILENAME = "results_eval_knn.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate from the command line; see `run_command`."""
    return run_command(
        argv, doc=__doc__, config_class=KnnEvalConfig, evaluate=evaluate_knn, results_file=RESULTS_FILENAME
    )


def eval_knn_with_model(*, model: nn.Module, autocast_dtype: torch.dtype, config: KnnEvalConfig) -> dict[str, float]:
    """Run the evaluation that `config` describes on a backbone, and write its line and score files.

    Args:
        model: gives the class token [B, D] for images [B, 3, H, W].
        autocast_dtype: the precision that it runs in; float32 means without autocast.
        config: datasets and settings; `config.model` is ignored.

    Returns:
        The results table: `"<k> Top 1"`, ... in percent.
    """
    return evaluate_knn(FrozenBackbone(model, autocast_dtype), config).metrics


def evaluate_knn(backbone: FrozenBackbone, config: KnnEvalConfig) -> EvaluationResult:
    """Classify the test images by the training images of each try, as `config` describes; see the module."""
    config.transform.check(backbone)
    transform = make_transform(config.transform)
    train_dataset = open_dataset(config.train.dataset, transform, "train.dataset")
    test_dataset = open_dataset(config.eval.test_dataset, transform, "eval.test_dataset")
    train_labels = read_train_labels(train_dataset)
    num_classes = count_classes(train_labels)
    test = make_scored_dataset(
        test_dataset,
        config.eval.test_metric_type,
        train_dataset=train_dataset,
        num_classes=num_classes,
        name="eval.test_dataset",
        train_labels=train_labels,
    )
    few_shot = config.few_shot
    tries = create_train_dataset_dict(train_dataset, few_shot.enable, few_shot.k_or_percent, few_shot.n_tries)
    store = config.features.make_store()
    train_data_dict, test_rows = _extract(backbone, tries, test, config, store)

    def save(values: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None, suffix: str) -> None:
        save_per_class(values, config.output_dir, config.eval.test_dataset, f"_{suffix}")
        if scores is not None:
            save_results(**scores, output_dir=config.output_dir, filename_suffix=suffix)

    per_k = score_features(
        test_rows,
        train_data_dict,
        test.metric,
        config.train,
        num_classes=num_classes,
        device=backbone.device,
        class_mapping=test.class_mapping,
        stream=store.is_too_large(len(train_dataset), test_rows.features.shape[1]),
        save=save,
        keep_scores=config.save_results,
    )
    results = make_columns(per_k, few_shot.n_tries)
    for name, value in results.items():
        logger.info("k-NN %s: %.2f", name, value)
    if distributed.is_main_process():
        with atomic_write(Path(config.output_dir) / LINES_FILENAME, "w") as file:
            file.writelines(f'{{"{name}": {value}}}\n' for name, value in results.items() if not name.endswith(" std"))
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
        report=_format_report(results, config, datasets, backbone.description),
    )


def eval_knn(
    *,
    model: nn.Module,
    train_data_dict: Mapping[int, Mapping[str, Tensor]],
    test_data_loader: Iterable[Any],
    metric_collection: Any,
    knn_config: TrainConfig,
    num_classes: int,
) -> dict[int, dict[str, float]]:
    """Classify the images of a loader by the training features of each try.

    Args:
        model: gives [B, D] for a batch of images; each image goes through it once.
        train_data_dict: by try, as returned by `extract_features_for_dataset_dict`.
        test_data_loader: yields `(images, (index, targets))`, as that of `make_enumerated_loader` does.
        metric_collection: updated and computed in copies.
        knn_config: `ks` and the settings of the vote.
        num_classes: number of training classes.

    Returns:
        Metrics in percent by k; with several tries their `<metric>_mean` and `<metric>_std`.
    """
    rows = extract_rows(model, test_data_loader, description="test features")
    return score_features(
        rows, train_data_dict, metric_collection, knn_config, num_classes=num_classes, device=model_device(model)
    )


def _extract(
    backbone: FrozenBackbone, tries: Mapping[int, Any], test: ScoredDataset, config: KnnEvalConfig, store: FeatureStore
) -> tuple[dict[int, dict[str, Tensor]], FeatureRows]:
    # The training features of each try, and this process's test features.
    feature = ModelWithPatchMean(backbone.model) if config.eval.feature is Feature.PATCH_MEAN else backbone.model
    model = wrap_model(feature, normalize=True)
    with backbone.autocast():
        train_data_dict = extract_features_for_dataset_dict(
            model,
            tries,
            config.train.batch_size,
            config.train.num_workers,
            gather_on_cpu=True,
            shard_above_bytes=int(config.train.memory_budget_mb * 2**20),
            store=store,
        )
        test_rows = extract_cached(
            model,
            test.dataset,
            store,
            batch_size=config.eval.batch_size or config.train.batch_size,
            num_workers=config.eval.num_workers,
            collate_fn=test.collate_fn,
            description="test features",
        )
    return train_data_dict, test_rows


def make_columns(per_k: Mapping[int, Mapping[str, float]], n_tries: int) -> dict[str, float]:
    """Name the metrics of each k as the columns of the results file: `"<k> Top 1"`, ...

    The published columns come first (with several tries they are means), then those of groups of images, then standard
    deviations.
    """
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
    return columns


def _format_report(results: Mapping[str, float], config: KnnEvalConfig, datasets: Mapping[str, Any], model: str) -> str:
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
