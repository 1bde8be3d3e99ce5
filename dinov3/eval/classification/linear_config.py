"""The configuration of linear probing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from omegaconf import MISSING
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.configs.settings import key
from dinov3.eval.classification.config import ClassificationConfig
from dinov3.eval.classification.metrics import ClassificationMetricType

RESULTS_FILENAME = "results-linear.csv"
#: Regular expressions of the columns that `eval.report` shows.
MAIN_METRICS = [".*_accuracy(_mean)?"]
LEARNING_RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]


class LossType(Enum):
    """The loss of single-label and of multi-label problems."""

    CROSS_ENTROPY = "cross_entropy"
    BINARY_CROSS_ENTROPY = "binary_cross_entropy"

    def get_criterion(self) -> nn.Module:
        """Return a loss of (logits [B, C], targets) without reduction."""
        if self is LossType.CROSS_ENTROPY:
            return nn.CrossEntropyLoss(reduction="none")
        return nn.BCEWithLogitsLoss(reduction="none")


class OptimizerType(Enum):
    """The optimizer, without weight decay."""

    SGD = "sgd"
    ADAMW = "adamw"

    def get_optimizer(self, optim_param_groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the optimizer of parameter groups that have their own `lr`."""
        if self is OptimizerType.SGD:
            return torch.optim.SGD(optim_param_groups, momentum=0.9, weight_decay=0)
        return torch.optim.AdamW(optim_param_groups, weight_decay=0)


class SchedulerType(Enum):
    """The schedule of the learning rates; `ONE_CYCLE` also moves momentum or beta1."""

    COSINE_ANNEALING = "cosine_annealing"
    ONE_CYCLE = "one_cycle"

    def get_scheduler(
        self,
        optimizer: torch.optim.Optimizer,
        optim_param_groups: Iterable[dict[str, Any]],
        epoch_length: int,
        epochs: int,
        max_iter: int,
    ) -> LRScheduler:
        """Build a scheduler that is stepped `max_iter` times, once per training step."""
        if self is SchedulerType.COSINE_ANNEALING:
            return CosineAnnealingLR(optimizer, max_iter, eta_min=0)
        lrs = [group["lr"] for group in optim_param_groups]
        return OneCycleLR(optimizer, max_lr=lrs, steps_per_epoch=epoch_length, epochs=epochs)


@dataclass
class TrainConfig:
    """Training and validation images, and how the classifiers are trained."""

    dataset: str = key(MISSING, "labelled training images, e.g. ImageFolder:root=DIR")
    val_dataset: str = key(MISSING, "labelled images that choose among the classifiers, e.g. ImageFolder:root=DIR")
    val_metric_type: ClassificationMetricType = key(
        ClassificationMetricType.MEAN_ACCURACY, "metric that the classifiers are chosen by"
    )
    batch_size: int = key(128, "images per step and process; half as many on twice the processes is the same training")
    num_workers: int = key(8, "loader processes")
    learning_rates: list[float] = key(LEARNING_RATES, "rates for a global batch of 256; one classifier for each")
    n_last_blocks_list: list[int] = key([1], "how many last blocks to use; a grid with the learning rates")
    loss_type: LossType = key(LossType.CROSS_ENTROPY, "CROSS_ENTROPY, or BINARY_CROSS_ENTROPY for multi-hot labels")
    optimizer_type: OptimizerType = key(OptimizerType.SGD, "SGD or ADAMW")
    scheduler_type: SchedulerType = key(SchedulerType.COSINE_ANNEALING, "COSINE_ANNEALING or ONE_CYCLE")
    epochs: int = key(10, "number of epochs")
    epoch_length: int | None = key(1250, "steps per epoch; null: one pass over the training images")
    save_checkpoint_iterations: int | None = key(None, "steps between checkpoints; null: one epoch")
    eval_period_iterations: int | None = key(None, "steps between validations; null: one epoch; 0 or less: none")
    checkpoint_retention_policy: CheckpointRetentionPolicy = key(
        CheckpointRetentionPolicy.NONE, "checkpoints to keep at the end: ALL, BEST, LAST, LAST_AND_BEST or NONE"
    )
    resume: bool = key(True, "continue from the newest checkpoint")
    classifier_fpath: str | None = key(None, "checkpoint file or directory to continue from, if output_dir has none")
    augment: bool = key(True, "random crops and flips; false: train on features that are computed once")
    memory_budget_mb: float = key(8192, "memory per process and dataset for features that are kept between passes")

    def check_blocks(self, model: nn.Module) -> None:
        """Raise a ValueError if more blocks are asked for than a backbone has."""
        n_blocks = getattr(model, "n_blocks", None)
        if isinstance(n_blocks, int) and max(self.n_last_blocks_list) > n_blocks:
            raise ValueError(
                f"train.n_last_blocks_list={list(self.n_last_blocks_list)}: the model has only {n_blocks} blocks"
            )

    def __post_init__(self) -> None:
        if not self.learning_rates or not all(rate > 0 for rate in self.learning_rates):
            raise ValueError(f"train.learning_rates={list(self.learning_rates)}: expected one or more, all above 0")
        if not self.n_last_blocks_list or min(self.n_last_blocks_list) < 1:
            raise ValueError(
                f"train.n_last_blocks_list={list(self.n_last_blocks_list)}: expected one or more, all at least 1"
            )
        if len(set(self.n_last_blocks_list)) < len(self.n_last_blocks_list):
            raise ValueError(f"train.n_last_blocks_list={list(self.n_last_blocks_list)}: a number occurs twice")
        if self.batch_size < 1 or self.num_workers < 0 or self.memory_budget_mb <= 0:
            raise ValueError(
                "train.batch_size and train.memory_budget_mb must be above 0, and train.num_workers 0 or more"
            )
        if self.epochs < 1 or (self.epoch_length is not None and self.epoch_length < 1):
            raise ValueError(f"train.epochs={self.epochs}, train.epoch_length={self.epoch_length}: expected 1 or more")
        if self.classifier_fpath and not self.resume:
            raise ValueError(f"train.classifier_fpath={self.classifier_fpath} needs train.resume=true")
        if self.save_checkpoint_iterations is not None and self.save_checkpoint_iterations < 1:
            raise ValueError(f"train.save_checkpoint_iterations={self.save_checkpoint_iterations}: expected 1 or more")


@dataclass
class EvalConfig:
    """Test images, and what is measured on them."""

    test_datasets: list[str] = key([], "labelled test images, any number of datasets")
    test_metric_types: list[ClassificationMetricType] = key(
        [], "one per test dataset, or one for all; none: train.val_metric_type"
    )
    batch_size: int = key(256, "images per step and process, for the validation images too")
    num_workers: int = key(8, "loader processes")

    def __post_init__(self) -> None:
        n_sets, n_types = len(self.test_datasets), len(self.test_metric_types)
        if n_types not in (0, 1, n_sets):
            raise ValueError(f"eval.test_metric_types has {n_types} entries for {n_sets} eval.test_datasets")
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError("eval.batch_size must be positive, eval.num_workers 0 or more")


@dataclass
class LinearEvalConfig(ClassificationConfig):
    """The settings of linear probing."""

    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save_results: bool = key(False, "write the chosen classifier's scores and targets as .npy")
