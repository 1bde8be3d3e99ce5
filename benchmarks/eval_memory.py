"""What scoring adds to the memory of features, by the number of test images and of classes, on the CPU.

    python benchmarks/eval_memory.py

k-NN: `eval_knn` with its metrics, k up to 200. Logistic regression: fits for two values of C, one iteration each, and
the scores of one of them. Linear probing: a training step of 13 classifiers, and the scores of all. Features have 64
dimensions (linear probing: 128), training sets one row per class, at least 10 000. Budgets are 128 MiB. Each case is
a process of its own; the figure is its peak of resident memory less what it had before, with features and labels.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov3.eval.classification.knn_config import TrainConfig as KnnTrainConfig
from dinov3.eval.classification.knn_module import score_features
from dinov3.eval.classification.linear_config import LEARNING_RATES
from dinov3.eval.classification.linear_heads import setup_linear_classifiers
from dinov3.eval.classification.linear_scoring import score_classifiers
from dinov3.eval.classification.linear_training import train_step
from dinov3.eval.classification.log_regression_config import TrainConfig
from dinov3.eval.classification.log_regression_module import LogRegModule, fit_modules
from dinov3.eval.classification.metrics import ClassificationMetricType, build_classification_metric
from dinov3.eval.features.cache import FeatureRows
from dinov3.eval.log_regression import evaluate_logreg_model

DIM = 64
BUDGET_MB = 128
CASES = [(5000, 100), (50_000, 100), (5000, 1000), (50_000, 1000), (5000, 21_841), (20_000, 21_841)]
EVALUATIONS = ("knn", "logistic regression", "linear")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.case:
        measure(args.case[0], int(args.case[1]), int(args.case[2]))
        return
    print("| evaluation | test images | classes | peak, MiB | of which weights and their like | seconds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for evaluation in EVALUATIONS:
        for n_images, n_classes in CASES:
            command = [sys.executable, __file__, "--case", evaluation, str(n_images), str(n_classes)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"| {evaluation} | {n_images} | {n_classes} | {done.stdout.strip()} |", flush=True)


def measure(evaluation: str, n_images: int, n_classes: int) -> None:
    work = {"knn": knn, "logistic regression": logistic_regression, "linear": linear}[evaluation]
    work(rows(300, 7), rows(50, 7), 7)  # what is loaded at the first call
    train, test = rows(max(n_classes, 10_000), n_classes), rows(n_images, n_classes)
    before, started = peak_mib(), time.perf_counter()
    weights = work(train, test, n_classes)
    print(f"{peak_mib() - before:.0f} | {weights / 2**20:.0f} | {time.perf_counter() - started:.0f}")


def rows(n: int, n_classes: int) -> FeatureRows:
    generator = torch.Generator().manual_seed(n)
    return FeatureRows(torch.randn(n, DIM, generator=generator), torch.arange(n) % n_classes, torch.arange(n))


def metric(n_classes: int) -> Any:
    return build_classification_metric(ClassificationMetricType.MEAN_ACCURACY, num_classes=n_classes)


def knn(train: FeatureRows, test: FeatureRows, n_classes: int) -> int:
    score_features(
        test,
        {0: {"train_features": train.features, "train_labels": train.targets}},
        metric(n_classes),
        KnnTrainConfig(dataset="", ks=[10, 20, 100, 200], memory_budget_mb=BUDGET_MB),
        num_classes=n_classes,
        device=torch.device("cpu"),
    )
    return 0


def logistic_regression(train: FeatureRows, test: FeatureRows, n_classes: int) -> int:
    config = TrainConfig(dataset="", max_train_iters=1, memory_budget_mb=BUDGET_MB, product_dtype="float32")
    modules = [LogRegModule(C, logreg_config=config, num_classes=n_classes) for C in (1e-2, 1.0)]
    for module in fit_modules(modules, train.features, train.targets, "fits"):
        if module is modules[-1]:
            evaluate_logreg_model(logreg_model=module, test_rows=test, metric=metric(n_classes))
        module.weights = module.intercept = None
    return 8 * n_classes * (DIM + 1)


def linear(train: FeatureRows, test: FeatureRows, n_classes: int) -> int:
    tokens = [(torch.zeros(1, 4, DIM), torch.zeros(1, DIM))]
    classifiers, groups = setup_linear_classifiers(tokens, [1], LEARNING_RATES, 128, n_classes)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    inputs = torch.cat([train.features, train.features], dim=1)[:128]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    train_step(classifiers, inputs, train.targets[:128], nn.CrossEntropyLoss(reduction="none"), optimizer, scheduler)
    kept = test._replace(features=torch.cat([test.features, test.features], dim=1))
    batches = zip(*(part.split(256) for part in (kept.features, kept.positions, kept.targets)), strict=True)
    score_classifiers(classifiers, batches, metric(n_classes))
    # Weights, gradients and momenta of all classifiers, and the test features made here.
    return 3 * sum(parameter.nbytes for parameter in classifiers.parameters()) + kept.features.nbytes


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
