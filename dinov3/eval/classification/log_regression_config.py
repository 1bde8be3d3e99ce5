"""The configuration of a logistic regression evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

import torch
from omegaconf import MISSING

from dinov3.configs.settings import key
from dinov3.distributed import runtime
from dinov3.eval.classification.config import ClassificationConfig, TransformConfig
from dinov3.eval.classification.metrics import ClassificationMetricType
from dinov3.utils import as_torch_dtype

RESULTS_FILENAME = "results-log-regression.csv"
#: Regular expressions of the columns that `eval.report` shows.
MAIN_METRICS = ["top-1(_mean)?"]
DTYPES = ("float32", "float64")
AUTO_DTYPE = "auto"
#: Multiply-adds of a pass over the features below which float64 costs little, because function calls dominate.
SMALL_PASS = 2**18


class Solver(Enum):
    """What fits the models."""

    AUTO = "auto"
    SKLEARN = "sklearn"
    TORCH = "torch"


@dataclass
class TrainConfig:
    """Training and validation images, and the fit."""

    dataset: str = key(MISSING, "labelled training images, e.g. ImageFolder:root=DIR")
    val_dataset: str | None = key(None, "images to choose C by; null: a tenth of the training images")
    val_metric_type: ClassificationMetricType = key(
        ClassificationMetricType.MEAN_ACCURACY, "what to choose C by, such as MEAN_PER_CLASS_ACCURACY"
    )
    batch_size: int = key(256, "images per step and process")
    num_workers: int = key(5, "loader processes")
    solver: Solver = key(
        Solver.AUTO, "TORCH, or SKLEARN, which is the published one and many times slower; AUTO: TORCH"
    )
    tol: float = key(1e-12, "where a fit ends; TORCH: when a step would lower the objective by less than this share")
    max_train_iters: int = key(1000, "of L-BFGS")
    train_features_device: str = key(
        "cpu", "where features are held, cpu or cuda; TORCH computes on the model's device"
    )
    train_dtype: str = key("float64", "of SKLEARN: float64 or float32")
    product_dtype: str = key(
        AUTO_DTYPE,
        "of TORCH's matrix products; its sums are float64. auto: float32, and float64 for the last iterations",
    )
    memory_budget_mb: float = key(
        4096, "for TORCH's copy of the features; larger features are transformed block by block in each iteration"
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0 or self.memory_budget_mb <= 0 or self.max_train_iters < 1:
            raise ValueError(
                "train.batch_size, train.memory_budget_mb and train.max_train_iters must be above 0, "
                "train.num_workers at least 0"
            )
        if not 0 < self.tol < 1:
            raise ValueError(f"train.tol={self.tol}: expected a number between 0 and 1")
        for name, dtypes in (("train_dtype", DTYPES), ("product_dtype", (AUTO_DTYPE, *DTYPES))):
            if getattr(self, name) not in dtypes:
                raise ValueError(f"train.{name}={getattr(self, name)}: expected {' or '.join(dtypes)}")
        if self.train_features_device not in ("cpu", "cuda"):
            raise ValueError(f"train.train_features_device={self.train_features_device}: expected cpu or cuda")
        if self.train_features_device == "cuda" and runtime.device().type != "cuda":
            raise ValueError("train.train_features_device=cuda: there is no GPU here, use cpu")
        if self.train_features_device == "cuda" and self.solver is Solver.SKLEARN:
            raise ValueError("train.solver=SKLEARN needs train.train_features_device=cpu; or choose train.solver=TORCH")

    def resolved_solver(self) -> Solver:
        """Return the solver, with AUTO resolved: both find the same classifiers, TORCH in a fraction of the time."""
        return Solver.TORCH if self.solver is Solver.AUTO else self.solver

    def product_dtypes(self, n_products: int) -> list[torch.dtype]:
        """Return the dtypes of a fit's matrix products, one after the other, given the multiply-adds of a pass."""
        if self.product_dtype != AUTO_DTYPE:
            return [as_torch_dtype(self.product_dtype)]
        return [torch.float64] if n_products <= SMALL_PASS else [torch.float32, torch.float64]


@dataclass
class EvalConfig:
    """Test images, and what is measured."""

    test_dataset: str = key(MISSING, "labelled test images, e.g. ImageFolder:root=DIR")
    batch_size: int | None = key(None, "images per step and process; null: train.batch_size")
    num_workers: int = key(5, "loader processes")
    test_metric_type: ClassificationMetricType | None = key(None, "what is reported; null: train.val_metric_type")


@dataclass
class LogregTransformConfig(TransformConfig):
    """As for the other evaluations, but the whole short side is seen."""

    CUSTOMARY_RATIO: ClassVar[float] = 1.0

    resize_size: int = key(224, "short side after resizing, pixels")


@dataclass
class LogregEvalConfig(ClassificationConfig):
    """Everything that a logistic regression evaluation is configured with."""

    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    transform: LogregTransformConfig = field(default_factory=LogregTransformConfig)
    save_results: bool = key(False, "write class probabilities and targets as .npy")

    def resolved_test_metric_type(self) -> ClassificationMetricType:
        """Return the metric of the test images."""
        return self.eval.test_metric_type or self.train.val_metric_type
