"""The configuration of a k-NN evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from dinov3.configs.settings import key
from dinov3.eval.classification.config import ClassificationConfig
from dinov3.eval.classification.metrics import ClassificationMetricType

RESULTS_FILENAME = "results-knn.csv"
#: Regular expressions of the columns that `eval.report` shows.
MAIN_METRICS = [".* Top 1"]


class Feature(Enum):
    """What represents an image."""

    CLS = "cls"
    PATCH_MEAN = "patch_mean"


@dataclass
class TrainConfig:
    """Training images and the classifier."""

    dataset: str = key(MISSING, "labelled training images, e.g. ImageFolder:root=DIR")
    batch_size: int = key(256, "images per step and process")
    num_workers: int = key(5, "loader processes")
    ks: list[int] = key([10, 20, 100, 200], "numbers of neighbours; a number above that of the images means all")
    temperature: float = key(0.07, "of the softmax over similarities; inf: all neighbours count the same")
    skip_first_nn: bool = key(False, "drop the best neighbour: the training images are also the test images")
    similarity_dtype: str = key("float32", "of the similarity product; bfloat16 mimics the published computation")
    memory_budget_mb: float = key(
        512, "for temporaries of the search; if features exceed it, processes divide the training rows"
    )

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"train.ks={list(self.ks)}: expected at least one number, all 1 or more")
        if not self.temperature > 0:
            raise ValueError(f"train.temperature={self.temperature}: expected more than 0")
        if self.similarity_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"train.similarity_dtype={self.similarity_dtype}: expected float32 or bfloat16")
        if self.batch_size < 1 or self.num_workers < 0 or self.memory_budget_mb <= 0:
            raise ValueError(
                "train.batch_size and train.memory_budget_mb must be above 0, train.num_workers at least 0"
            )


@dataclass
class EvalConfig:
    """Test images, and what is measured."""

    test_dataset: str = key(MISSING, "labelled test images, e.g. ImageFolder:root=DIR")
    test_metric_type: ClassificationMetricType = key(
        ClassificationMetricType.MEAN_ACCURACY, "or MEAN_PER_CLASS_ACCURACY, ANY_MATCH_ACCURACY, ..."
    )
    batch_size: int | None = key(None, "images per step and process; null: train.batch_size")
    num_workers: int = key(5, "loader processes")
    feature: Feature = key(Feature.CLS, "CLS or PATCH_MEAN, of training and test images")


@dataclass
class KnnEvalConfig(ClassificationConfig):
    """Everything that a k-NN evaluation is configured with."""

    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
