"""Fitting logistic regressions with an L2 penalty, for many values of C: scikit-learn's L-BFGS, or ours in torch.

For a value of C, the sum over samples of the loss, plus ||W||^2 / (2 C), is minimised; intercepts are not penalised and
features are used as they are. Classes are of one of two kinds: exclusive ones, with a softmax over rows of W, or
independent columns with a sigmoid each: multi-hot labels, and the one column that tells two classes apart.

Notable in ours:
- All values of C are fitted at once: each pass over the features gives the loss and gradient of every model that is
  not done. Each model is multiplied on its own, so that it has the same bits whichever others there are, and a sweep
  the same figures however it is divided over processes.
- It works on the principal axes of the features, which changes neither the models nor their penalty. There, the
  Hessian at the start is close to diagonal and known, so that searches take a fraction of the usual iterations.
- Matrix products are in float32 if not asked otherwise; sums, the penalty and the searches are in float64.
- Features may be anywhere, also in a mapped file; blocks of rows come to the device as they are needed.
- Where the searches of all values of C do not fit into memory together, fewer run at once.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.classification.log_regression_lbfgs import HISTORY, run_together, search_minimum

logger = logging.getLogger("dinov3")

#: Temporaries of a block of rows in `fit_with_torch` have about this many elements.
BLOCK_ELEMENTS = 2**20
#: What a search holds at most, in vectors of the size of its point: its history twice, and what it computes with.
VECTORS_PER_SEARCH = 2 * HISTORY + 10
#: By the dtype of products: how far above its minimum the loss of a sample may end, on average.
REACHABLE = {torch.float32: 1e-9, torch.float64: 1e-14}


class Fit(NamedTuple):
    """A fitted model.

    Attributes:
        weights: float64 [R, D], on the CPU; R is the number of classes, or of columns.
        intercept: float64 [R].
        n_iterations: of the solver.
        converged: false if the limit of iterations ended it.
    """

    weights: Tensor
    intercept: Tensor
    n_iterations: int
    converged: bool


def fit_with_sklearn(
    features: Tensor, targets: Tensor, C: float, *, tol: float, max_iterations: int, dtype: torch.dtype
) -> Fit:
    """Fit with scikit-learn, on the CPU.

    Args:
        features: [N, D].
        targets: classes int64 [N], each of 0..R-1 occurring; or columns [N, R] of 0 and 1, each of both kinds.
        C: inverse weight of the penalty.
        tol: passed on.
        max_iterations: of L-BFGS.
        dtype: that it computes in.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    check_sklearn()
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    samples = features.to("cpu", dtype).numpy()
    columns = [targets] if targets.ndim == 1 else list(targets.T)
    models = []
    for column in columns:
        model = LogisticRegression(C=C, tol=tol, max_iter=max_iterations)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # `converged` tells
            models.append(model.fit(samples, column.cpu().numpy()))
    n_iterations = max(int(model.n_iter_.max()) for model in models)
    return Fit(
        weights=torch.cat([torch.from_numpy(model.coef_).double() for model in models]),
        intercept=torch.cat([torch.from_numpy(model.intercept_).double() for model in models]),
        n_iterations=n_iterations,
        converged=n_iterations < max_iterations,
    )


def check_sklearn() -> None:
    """Refuse to go on without scikit-learn.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "train.solver=SKLEARN needs scikit-learn: pip install scikit-learn, or choose train.solver=TORCH"
        ) from error


def fit_with_torch(
    features: Tensor,
    targets: Tensor,
    Cs: Sequence[float],
    *,
    device: torch.device,
    tol: float,
    max_iterations: int,
    dtype: torch.dtype,
    memory_budget_bytes: int,
    advance: Callable[[int, str], None] = lambda n_fits, note: None,
) -> Iterator[Fit]:
    """Fit a model for each value of C, all at once, or as many at once as memory allows.

    Args:
        features: [N, D], on any device.
        targets: classes int64 [N], each of 0..R-1 occurring; or columns [N, R] of 0 and 1, each of both kinds.
        Cs: inverse weights of the penalty.
        device: where the work is done.
        tol: excess of the mean loss over its minimum that ends a search; no less than `dtype` can reach.
        max_iterations: of each search.
        dtype: of matrix products.
        memory_budget_bytes: within which features are kept on their principal axes, otherwise blocks of them are
            transformed each time; and within which searches run together.
        advance: told how many fits have just ended, and in a few words how far the others are.

    Yields:
        The fits, in the order of `Cs`.
    """
    if not Cs:
        return
    rows = _Rows(features, targets, device, dtype, memory_budget_bytes)
    start, curvature = _start(rows)
    at_once = max(1, memory_budget_bytes // (VECTORS_PER_SEARCH * start.nbytes))
    for first in range(0, len(Cs), at_once):
        part = Cs[first : first + at_once]
        searches = [
            search_minimum(
                start,
                _make_precondition(rows, curvature, C),
                tolerance=max(tol, REACHABLE[dtype]) * len(features),
                noise=torch.finfo(dtype).eps * len(features),
                max_iterations=max_iterations,
            )
            for C in part
        ]
        evaluate = functools.partial(_losses_and_gradients, rows, part)
        minima = run_together(searches, evaluate, lambda n_rounds, n_ended: advance(n_ended, f"iteration {n_rounds}"))
        del searches
        while minima:
            minimum = minima.pop(0)
            weights = minimum.point[:, :-1] @ rows.axes.T  # [R, D]
            intercept = minimum.point[:, -1] - weights @ rows.mean
            yield Fit(weights.cpu(), intercept.cpu(), minimum.n_iterations, minimum.converged)


class _Rows:
    """Blocks of features on their principal axes, with their targets.

    Points of the searches are [R, d + 1]: weights on the d axes along which features vary, and the intercept.
    """

    def __init__(
        self, features: Tensor, targets: Tensor, device: torch.device, dtype: torch.dtype, memory_budget_bytes: int
    ) -> None:
        self.device, self.dtype = device, dtype
        self.n_outputs = int(targets.max()) + 1 if targets.ndim == 1 else targets.shape[1]
        self.targets = targets.to(device)
        size = max(1, BLOCK_ELEMENTS // max(self.n_outputs, features.shape[1]))
        self.blocks = list(features.split(size))
        self.target_blocks = list(self.targets.split(size))
        self.mean = torch.stack([self._load(block).sum(dim=0) for block in self.blocks]).sum(dim=0) / len(features)
        scatter = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=device)
        for block in self.blocks:
            centred = self._load(block) - self.mean
            scatter.addmm_(centred.T, centred)
        variances, axes = torch.linalg.eigh(scatter)
        varies = variances > variances[-1] * len(variances) * torch.finfo(torch.float64).eps
        self.axes = axes[:, varies]  # [D, d]
        n_samples = variances.new_tensor([len(features)])
        self.variances = torch.cat([variances[varies], n_samples])  # sums of squares, those of the intercept last
        n_bytes = len(features) * self.axes.shape[1] * dtype.itemsize
        self.kept = n_bytes <= memory_budget_bytes
        if self.kept:
            self.blocks = [self._transform(block) for block in self.blocks]
        else:
            logger.info(
                "logistic regression: %.0f MB of features are above train.memory_budget_mb=%.0f, "
                "going through them in blocks, which takes longer",
                n_bytes / 2**20,
                memory_budget_bytes / 2**20,
            )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for block, targets in zip(self.blocks, self.target_blocks, strict=True):
            yield (block if self.kept else self._transform(block)), targets

    def _load(self, block: Tensor) -> Tensor:
        return block.to(self.device, torch.float64)

    def _transform(self, block: Tensor) -> Tensor:
        return ((self._load(block) - self.mean) @ self.axes).to(self.dtype)


def _start(rows: _Rows) -> tuple[Tensor, Tensor]:
    # Weights 0 and the intercepts that are best then; and the curvature of the loss in each output there.
    if rows.targets.ndim == 1:
        shares = torch.bincount(rows.targets, minlength=rows.n_outputs).double() / len(rows.targets)
        intercept, curvature = shares.log() - shares.log().mean(), shares
    else:
        shares = rows.targets.double().mean(dim=0)
        intercept, curvature = shares.logit(), shares * (1 - shares)
    point = torch.zeros(rows.n_outputs, len(rows.variances), dtype=torch.float64, device=rows.device)
    point[:, -1] = intercept
    return point, curvature


def _make_precondition(rows: _Rows, curvature: Tensor, C: float) -> Callable[[Tensor], Tensor]:
    # The inverse of the Hessian at the start, for one class or column at a time.
    penalty = torch.full_like(rows.variances, 1 / C)
    penalty[-1] = 0
    inverse_hessian = 1 / (curvature[:, None] * rows.variances + penalty)

    def precondition(gradient: Tensor) -> Tensor:
        direction = inverse_hessian * gradient
        # A softmax does not tell what all classes have in common, so that is 0 in the solution: stay there.
        return direction - direction.mean(dim=0) if rows.targets.ndim == 1 else direction

    return precondition


def _losses_and_gradients(
    rows: _Rows, all_Cs: Sequence[float], numbers: Sequence[int], points: Sequence[Tensor]
) -> list[tuple[float, Tensor]]:
    Cs = [all_Cs[number] for number in numbers]
    block_loss = _softmax_loss if rows.targets.ndim == 1 else _sigmoid_loss
    losses, gradients = [], []
    for point, C in zip(points, Cs, strict=True):
        penalised = point[:, :-1]
        losses.append(penalised.square().sum() / (2 * C))
        gradients.append(F.pad(penalised / C, (0, 1)))
    rounded = [(point[:, :-1].to(rows.dtype), point[:, -1].to(rows.dtype)) for point in points]
    for features, targets in rows:
        for number, (weights, intercept) in enumerate(rounded):
            loss, residuals = block_loss(torch.addmm(intercept, features, weights.T), targets)
            losses[number] += loss
            gradients[number][:, :-1] += residuals.T @ features
            gradients[number][:, -1] += residuals.sum(dim=0, dtype=torch.float64)
    return list(zip(torch.stack(losses).tolist(), gradients, strict=True))


def _softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    # The loss, summed in float64, and its derivatives by the logits [B, R].
    log_probabilities = logits.log_softmax(dim=1)
    own = targets[:, None]
    loss = -log_probabilities.gather(1, own).sum(dtype=torch.float64)
    # Denormal numbers, which slow products down by far, come of exponents below -87.
    return loss, log_probabilities.clamp_(min=-60).exp_().scatter_add_(
        1, own, -torch.ones_like(own, dtype=logits.dtype)
    )


def _sigmoid_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    targets = targets.to(logits.dtype)
    loss = (F.softplus(logits) - targets * logits).sum(dtype=torch.float64)
    return loss, logits.sigmoid() - targets
