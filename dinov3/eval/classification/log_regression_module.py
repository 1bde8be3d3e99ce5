"""Logistic regression on given features, and the choice of its penalty on validation data.

Notable:
- The published grid of 45 values of C is scored on the validation data, the smallest of equally good ones is chosen.
  The final model is then fitted on training and validation data together.
- Processes divide the values of C. Figures do not depend on how many there are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.distributed import runtime
from dinov3.eval.classification.log_regression_config import Solver, TrainConfig
from dinov3.eval.classification.log_regression_solvers import Fit, fit_with_sklearn, fit_with_torch
from dinov3.eval.classification.metrics import scalar_results
from dinov3.eval.command.progress import Progress
from dinov3.eval.features.cache import IN_MEMORY, FeatureStore
from dinov3.eval.features.extraction import check_finite_rows, join_rows
from dinov3.utils import as_torch_dtype

logger = logging.getLogger("dinov3")

C_POWER_RANGE = torch.linspace(-6, 5, 45)
C_VALUES: list[float] = (10**C_POWER_RANGE).tolist()
SCORES_PER_BATCH = 2**20


class LogRegModule(nn.Module):
    """A logistic regression with an L2 penalty: a softmax for exclusive classes, one vector and a sigmoid for two.

    Args:
        C: inverse weight of the penalty.
        multi_label: labels are multi-hot, and columns are independent of each other.
        logreg_config: settings of the fit.
        num_classes: columns of the probabilities. Default: as many as the labels of `fit` need. Classes that do not
            occur there get probability 0.

    Attributes:
        weights: float64 [R, D], by class that occurs, or [1, D] for two classes; None before `fit`.
        intercept: float64 [R].
        classes: int64, the classes that occur, ascending; of multi-hot labels, the columns with both values.
        n_iterations: of the solver.
        converged: false if the fit reached the limit of iterations.
    """

    def __init__(
        self, C: float, multi_label: bool = False, *, logreg_config: TrainConfig, num_classes: int | None = None
    ) -> None:
        super().__init__()
        self.C = C
        self.multi_label = multi_label
        self.config = logreg_config
        self.num_classes = num_classes
        self.weights: Tensor | None = None
        self.intercept: Tensor | None = None
        self.sweep: Sweep | None = None

    def fit(self, features: Tensor, labels: Tensor) -> LogRegModule:
        """Fit to features [N, D] and labels, classes [N] or multi-hot [N, L].

        Raises:
            ValueError: there is only one class, features are not finite, or labels are not of the expected kind.
        """
        return next(fit_modules([self], features, labels, "fit"))

    def forward(self, samples: Tensor, targets: Any = None) -> dict[str, Any]:
        """Return `{"preds": probabilities float64 [B, C] on the device of samples, "target": targets}`."""
        if self.weights is None or self.intercept is None:
            raise RuntimeError("this LogRegModule is not fitted: call fit(features, labels) first")
        device = samples.device
        with torch.autocast(device.type, enabled=False):
            logits = samples.double() @ self.weights.to(device).T + self.intercept.to(device)  # [B, R]
        if self.multi_label:
            probabilities = logits.sigmoid()
        elif len(self.weights) == 1:
            probabilities = torch.cat([-logits, logits], dim=1).sigmoid()
        else:
            probabilities = logits.softmax(dim=1)
        preds = self.constant.to(device).repeat(len(samples), 1)
        preds[:, self.classes.to(device)] = probabilities
        return {"preds": preds, "target": targets}

    def _set(self, fit: Fit, columns: _Columns) -> None:
        self.weights, self.intercept, self.n_iterations, self.converged = fit
        self.classes, self.constant = columns


class _Columns(NamedTuple):
    # The columns of the probabilities that are fitted, and a row (float64) with the values of all others.
    fitted: Tensor
    constant: Tensor


@dataclass
class Sweep:
    """Validation results of all values of C, and which of them was chosen.

    Attributes:
        Cs: the values, ascending.
        metrics: validation metrics as fractions, by value.
        n_iterations: of the solver, by value.
        converged: by value.
        best: the index of the chosen one.
    """

    Cs: list[float]
    metrics: list[dict[str, float]]
    n_iterations: list[int]
    converged: list[bool]
    best: int


def fit_modules(
    modules: Sequence[LogRegModule], features: Tensor, labels: Tensor, description: str
) -> Iterator[LogRegModule]:
    """Fit modules that differ only in C; see `LogRegModule.fit`.

    Args:
        modules: not fitted.
        features: [N, D].
        labels: [N] or [N, L].
        description: of the progress bar.

    Yields:
        The modules, each as soon as it is fitted.
    """
    if not modules:
        return
    first = modules[0]
    _check(features, labels, first.multi_label)
    columns, targets = _split_columns(labels, first.num_classes)
    with Progress(description, len(modules), unit="C") as progress:
        fits = _fits(
            features, targets, [module.C for module in modules], first.config, lambda note: progress.advance(0, note)
        )
        for module, fit in zip(modules, fits, strict=True):
            progress.advance()
            module._set(fit, columns)
            yield module


def _fits(
    features: Tensor, targets: Tensor, Cs: Sequence[float], config: TrainConfig, report: Callable[[str], None]
) -> Iterator[Fit]:
    if config.resolved_solver() is Solver.SKLEARN:
        dtype = as_torch_dtype(config.train_dtype)
        _warn_of_copy(features, dtype, config.memory_budget_mb)
        for C in Cs:
            yield fit_with_sklearn(
                features, targets, C, tol=config.tol, max_iterations=config.max_train_iters, dtype=dtype
            )
        return
    n_outputs = int(targets.max()) + 1 if targets.ndim == 1 else targets.shape[1]
    yield from fit_with_torch(
        features,
        targets,
        Cs,
        device=runtime.device(),
        tol=config.tol,
        max_iterations=config.max_train_iters,
        dtypes=config.product_dtypes(features.numel() * n_outputs),
        memory_budget_bytes=int(config.memory_budget_mb * 2**20),
        report=report,
    )


def _warn_of_copy(features: Tensor, dtype: torch.dtype, budget_mb: float) -> None:
    size_mb = features.numel() * dtype.itemsize / 2**20
    if size_mb > budget_mb:
        logger.warning(
            "train.solver=SKLEARN copies all features: %.0f MB, more than train.memory_budget_mb=%.0f; "
            "train.solver=TORCH reads them in blocks",
            size_mb,
            budget_mb,
        )


def train_for_C(
    *,
    C: float,
    train_features: Tensor,
    train_labels: Tensor,
    logreg_config: TrainConfig,
    num_classes: int | None = None,
) -> LogRegModule:
    """Return a `LogRegModule` fitted for one value of C."""
    module = LogRegModule(C, train_labels.ndim == 2, logreg_config=logreg_config, num_classes=num_classes)
    return module.fit(train_features, train_labels)


def sweep_C_values(
    *,
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    val_metric: Any,
    train_config: TrainConfig,
    num_classes: int | None = None,
) -> Sweep:
    """Fit a model for each value of C and score it on validation data; every process must call it.

    Args:
        train_features: [N, D].
        train_labels: classes [N], or multi-hot [N, L].
        val_features: [M, D], all of them in each process.
        val_labels: what `val_metric` expects.
        val_metric: a metric; it is cloned.
        train_config: settings of the fit.
        num_classes: columns of the probabilities. Default: as many as the training labels need.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    is_multi_label = train_labels.ndim == 2
    width = num_classes or (train_labels.shape[1] if is_multi_label else int(train_labels.max()) + 1)
    # Large values first: they take longest, so the estimate of the time left is too long rather than too short.
    order = list(reversed(range(len(C_VALUES))))
    own = [
        LogRegModule(C_VALUES[index], is_multi_label, logreg_config=train_config, num_classes=num_classes)
        for index in order[rank::world_size]
    ]
    fitted = fit_modules(own, train_features, train_labels, "sweep of C")
    metrics: dict[int, dict[str, float]] = {}
    fits: dict[int, tuple[int, bool]] = {}
    for start in range(0, len(order), world_size):
        # Metrics are computed over the samples of all processes, so one process scores them all and the others none.
        module = next(fitted, None)
        for owner, index in enumerate(order[start : start + world_size]):
            metric = val_metric.clone().to(val_features.device)
            n_rows = len(val_features) if owner == rank else 0
            _update(metric, module, val_features[:n_rows], val_labels[:n_rows], width)
            metrics[index] = scalar_results(metric, metric.compute())
        own_fit: tuple[int, bool] | None = None
        if module is not None:
            own_fit = module.n_iterations, module.converged
            module.weights = module.intercept = None  # with many classes, all 45 would take gigabytes
        for index, fit in zip(order[start:], distributed.all_gather_objects(own_fit), strict=False):
            if fit is not None:
                fits[index] = fit
    sign = -1 if train_config.val_metric_type.is_lower_better else 1
    top_1 = [metrics[index]["top-1"] for index in range(len(C_VALUES))]
    scores = [-math.inf if math.isnan(value) else sign * value for value in top_1]
    _warn_of_limit(fits, train_config)
    return Sweep(
        Cs=C_VALUES,
        metrics=[metrics[index] for index in range(len(C_VALUES))],
        n_iterations=[fits[index][0] for index in range(len(C_VALUES))],
        converged=[fits[index][1] for index in range(len(C_VALUES))],
        best=scores.index(max(scores)),
    )


def rows_per_batch(num_classes: int) -> int:
    """Return how many rows to score at once, so that memory depends neither on their number nor on that of classes."""
    return max(1, SCORES_PER_BATCH // num_classes)


def _update(metric: Any, module: LogRegModule | None, features: Tensor, labels: Tensor, num_classes: int) -> None:
    if len(features) == 0:
        nothing = torch.zeros(0, num_classes, dtype=torch.float64, device=features.device)
        metric.update(preds=nothing, target=labels)
        return
    assert module is not None
    size = rows_per_batch(num_classes)
    for block, targets in zip(features.split(size), labels.split(size), strict=True):
        metric.update(**module(block, targets))


def get_best_logreg_with_features(
    *,
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    val_metric: Any,
    concatenate_train_val: bool,
    train_config: TrainConfig,
    num_classes: int | None = None,
    store: FeatureStore = IN_MEMORY,
) -> LogRegModule:
    """Fit the model with the best C of the grid; its `sweep` attribute holds the results of all.

    Args:
        train_features: [N, D].
        train_labels: classes [N], or multi-hot [N, L].
        val_features: [M, D].
        val_labels: classes [M], or multi-hot [M, L].
        val_metric: its "top-1" decides; among equals, the smallest C wins.
        concatenate_train_val: fit the final model on training and validation rows, not only on training rows.
        train_config: settings of the fit.
        num_classes: columns of the probabilities. Default: as many as the training labels need.
        store: for training and validation rows together, if they are too large for memory.
    """
    sweep = sweep_C_values(
        train_features=train_features,
        train_labels=train_labels,
        val_features=val_features,
        val_labels=val_labels,
        val_metric=val_metric,
        train_config=train_config,
        num_classes=num_classes,
    )
    best_C = sweep.Cs[sweep.best]
    logger.info("logistic regression: C=%.3g is best, top-1 %.4f", best_C, sweep.metrics[sweep.best]["top-1"])
    if sweep.best in (0, len(sweep.Cs) - 1):
        logger.warning("logistic regression: the chosen C=%.3g is at an end of the range that was tried", best_C)
    if concatenate_train_val:
        train_features = join_rows([train_features, val_features], store)
        train_labels = torch.cat([train_labels, val_labels])
    module = train_for_C(
        C=best_C,
        train_features=train_features,
        train_labels=train_labels,
        logreg_config=train_config,
        num_classes=num_classes,
    )
    module.sweep = sweep
    return module


def _check(features: Tensor, labels: Tensor, is_multi_label: bool) -> None:
    if len(features) == 0 or len(features) != len(labels):
        raise ValueError(f"{len(features)} rows of features and {len(labels)} labels: expected equal numbers, above 0")
    if labels.is_floating_point() or labels.ndim != (2 if is_multi_label else 1) or int(labels.min()) < 0:
        kind = "multi-hot rows [N, L]" if is_multi_label else "classes [N]"
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected {kind}, integers from 0 on"
        )
    check_finite_rows(features, "features")


def _split_columns(labels: Tensor, num_classes: int | None) -> tuple[_Columns, Tensor]:
    # The targets of the fitted columns are classes without gaps, or columns of 0 and 1.
    if labels.ndim == 1:
        classes, targets = labels.cpu().unique(return_inverse=True)
        check_several_classes(labels)
        width = num_classes or int(classes[-1]) + 1
        if int(classes[-1]) >= width:
            raise ValueError(f"label {int(classes[-1])} is out of range: there are only {width} classes")
        if len(classes) == 2:
            targets = targets[:, None]
        return _Columns(classes, torch.zeros(1, width, dtype=torch.float64)), targets
    shares = labels.double().mean(dim=0).cpu()
    fitted = ((shares > 0) & (shares < 1)).nonzero()[:, 0]
    if len(fitted) == 0:
        raise ValueError("no column of the multi-hot labels has both 0 and 1: there is nothing to learn")
    return _Columns(fitted, shares.round()[None]), labels.cpu()[:, fitted]


def check_several_classes(labels: Tensor) -> None:
    """Raise a ValueError if all labels [N] are of the same class."""
    if labels.ndim == 1 and int(labels.min()) == int(labels.max()):
        raise ValueError(
            f"all {len(labels)} training images are of class {int(labels[0])}; logistic regression needs at least two"
        )


def _warn_of_limit(fits: Mapping[int, tuple[int, bool]], config: TrainConfig) -> None:
    ended = [C_VALUES[index] for index in sorted(fits) if not fits[index][1]]
    if ended:
        logger.warning(
            "%d fits reached train.max_train_iters=%d before they converged; the smallest C among them is %.3g",
            len(ended),
            config.max_train_iters,
            ended[0],
        )
