"""Logistic regression on features that one already has, and the choice of its penalty on validation data.

Notable:
- The published grid of 45 values of C is scored on the validation data, the smallest of equally good ones is chosen.
  The final model is then fitted on training and validation data together.
- Processes divide the values of C. Figures do not depend on how many there are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.distributed import runtime
from dinov3.eval.log_regression_config import Solver, TrainConfig
from dinov3.eval.log_regression_solvers import Fit, fit_with_sklearn, fit_with_torch
from dinov3.eval.metrics import scalar_results
from dinov3.utils import as_torch_dtype

logger = logging.getLogger("dinov3")

C_POWER_RANGE = torch.linspace(-6, 5, 45)
C_VALUES: list[float] = (10**C_POWER_RANGE).tolist()
ROWS_PER_CHECK = 16384


class LogRegModule(nn.Module):
    """A logistic regression with an L2 penalty: a softmax for exclusive classes, of which two need but one vector.

    Args:
        C: inverse weight of the penalty.
        multi_label: labels are multi-hot, and columns are independent of each other.
        logreg_config: settings of the fit.
        num_classes: columns of the probabilities; None: as many as the labels of `fit` need. Classes that do not occur
            there get probability 0.

    Attributes:
        weights: float64 [R, D], by class that occurs, or [1, D] for two classes; None before `fit`.
        intercept: float64 [R].
        classes: int64, the classes that occur, ascending; of multi-hot labels, the columns with both values.
        n_iterations: of the solver.
        converged: false if the limit of iterations ended the fit.
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
            ValueError: there is but one class, features are not finite, or labels are not what was announced.
        """
        return fit_modules([self], features, labels)[0]

    def forward(self, samples: Tensor, targets: Any = None) -> dict[str, Any]:
        """`{"preds": probabilities float64 [B, C] on the device of samples, "target": targets}`."""
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
        preds = self._constant.to(device).repeat(len(samples), 1)
        preds[:, self.classes.to(device)] = probabilities
        return {"preds": preds, "target": targets}

    def _set(self, fit: Fit, columns: _Columns) -> None:
        self.weights, self.intercept, self.n_iterations, self.converged = fit
        self.classes, self._constant = columns


class _Columns(NamedTuple):
    # Which columns of the probabilities are fitted, and what stands in the others: float64, of one row.
    fitted: Tensor
    constant: Tensor


@dataclass
class Sweep:
    """What the choice of C was made of.

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


def fit_modules(modules: Sequence[LogRegModule], features: Tensor, labels: Tensor) -> list[LogRegModule]:
    """Fit modules that differ in C alone; arguments and errors as of `LogRegModule.fit`."""
    if not modules:
        return []
    first, config = modules[0], modules[0].config
    _check(features, labels, first.multi_label)
    columns, targets = _split_columns(labels, first.num_classes)
    Cs = [module.C for module in modules]
    if config.resolved_solver() is Solver.SKLEARN:
        dtype = as_torch_dtype(config.train_dtype)
        options: dict[str, Any] = {"tol": config.tol, "max_iterations": config.max_train_iters, "dtype": dtype}
        fits = [fit_with_sklearn(features, targets, C, **options) for C in Cs]
    else:
        fits = fit_with_torch(
            features,
            targets,
            Cs,
            device=runtime.device(),
            tol=config.tol,
            max_iterations=config.max_train_iters,
            dtype=as_torch_dtype(config.product_dtype),
            memory_budget_bytes=int(config.memory_budget_mb * 2**20),
        )
    for module, fit in zip(modules, fits, strict=True):
        module._set(fit, columns)
    return list(modules)


def train_for_C(
    *,
    C: float,
    train_features: Tensor,
    train_labels: Tensor,
    logreg_config: TrainConfig,
    num_classes: int | None = None,
) -> LogRegModule:
    """A fitted model for one value of C; `num_classes` as of `LogRegModule`."""
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
    """Score a model of each value of C on validation data; every process must call it.

    Args:
        train_features: [N, D].
        train_labels: classes [N], or multi-hot [N, L].
        val_features: [M, D], all of them in each process.
        val_labels: as `val_metric` wants them.
        val_metric: a metric, which is cloned.
        train_config: settings of the fit.
        num_classes: columns of the probabilities; None: as many as the training labels need.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    is_multi_label = train_labels.ndim == 2
    own = {
        index: LogRegModule(C, is_multi_label, logreg_config=train_config, num_classes=num_classes)
        for index, C in enumerate(C_VALUES)
        if index % world_size == rank
    }
    fit_modules(list(own.values()), train_features, train_labels)
    width = num_classes or (train_labels.shape[1] if is_multi_label else int(train_labels.max()) + 1)
    nothing = {"preds": val_features.new_zeros(0, width, dtype=torch.float64), "target": val_labels[:0]}
    metrics = []
    for index in range(len(C_VALUES)):
        # Metrics are of the samples of all processes: one process has them all, the others none.
        metric = val_metric.clone().to(val_features.device)
        metric.update(**(own[index](val_features, val_labels) if index in own else nothing))
        metrics.append(scalar_results(metric, metric.compute()))
    found = {index: (module.n_iterations, module.converged) for index, module in own.items()}
    fits = {index: fit for part in distributed.all_gather_objects(found) for index, fit in part.items()}
    sign = -1 if train_config.val_metric_type.is_lower_better else 1
    scores = [-math.inf if math.isnan(values["top-1"]) else sign * values["top-1"] for values in metrics]
    _warn_of_limit(fits, train_config)
    return Sweep(
        Cs=C_VALUES,
        metrics=metrics,
        n_iterations=[fits[index][0] for index in range(len(C_VALUES))],
        converged=[fits[index][1] for index in range(len(C_VALUES))],
        best=scores.index(max(scores)),
    )


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
) -> LogRegModule:
    """The model with the best C of the grid, whose `sweep` attribute tells how that was chosen.

    Args:
        train_features: [N, D].
        train_labels: classes [N], or multi-hot [N, L].
        val_features: [M, D].
        val_labels: classes [M], or multi-hot [M, L].
        val_metric: its "top-1" decides; the smallest C among equals.
        concatenate_train_val: fit the final model on training and validation rows, else on training rows.
        train_config: settings of the fit.
        num_classes: columns of the probabilities; None: as many as the training labels need.
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
    if concatenate_train_val:
        train_features = torch.cat([train_features, val_features])
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
        raise ValueError(f"{len(features)} rows of features and {len(labels)} labels: expected as many, and some")
    if labels.is_floating_point() or labels.ndim != (2 if is_multi_label else 1) or int(labels.min()) < 0:
        kind = "multi-hot rows [N, L]" if is_multi_label else "classes [N]"
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected {kind}, integers from 0 on"
        )
    n_bad = sum(int((~block.isfinite()).any(dim=1).sum()) for block in features.split(ROWS_PER_CHECK))
    if n_bad:
        raise ValueError(f"{n_bad} of {len(features)} rows of features have NaN or infinity; the model gave them")


def _split_columns(labels: Tensor, num_classes: int | None) -> tuple[_Columns, Tensor]:
    # Columns, and the targets of those that are fitted: classes without gaps, or columns of 0 and 1.
    if labels.ndim == 1:
        classes, targets = labels.cpu().unique(return_inverse=True)
        check_several_classes(labels)
        width = num_classes or int(classes[-1]) + 1
        if int(classes[-1]) >= width:
            raise ValueError(f"there is a label {int(classes[-1])}, but there are only {width} classes")
        if len(classes) == 2:
            targets = targets[:, None]
        return _Columns(classes, torch.zeros(1, width, dtype=torch.float64)), targets
    shares = labels.double().mean(dim=0).cpu()
    fitted = ((shares > 0) & (shares < 1)).nonzero()[:, 0]
    if len(fitted) == 0:
        raise ValueError("no column of the multi-hot labels has both 0 and 1: there is nothing to learn")
    return _Columns(fitted, shares.round()[None]), labels.cpu()[:, fitted]


def check_several_classes(labels: Tensor) -> None:
    """Refuse labels [N] of one class alone.

    Raises:
        ValueError: names the class.
    """
    if labels.ndim == 1 and int(labels.min()) == int(labels.max()):
        raise ValueError(
            f"all {len(labels)} training images are of class {int(labels[0])}; logistic regression needs at least two"
        )


def _warn_of_limit(fits: Mapping[int, tuple[int, bool]], config: TrainConfig) -> None:
    ended = [C_VALUES[index] for index in sorted(fits) if not fits[index][1]]
    if ended:
        logger.warning(
            "%d fits were ended by train.max_train_iters=%d, the smallest C of them is %.3g",
            len(ended),
            config.max_train_iters,
            ended[0],
        )
