"""Fitting logistic regressions with an L2 penalty: scikit-learn's solver, or `torch.optim.LBFGS` on our own objective.

For a value of C, the sum over samples of the loss, plus ||W||^2 / (2 C), is minimised; intercepts are not penalised and
features are used as they are. Classes are of one of two kinds: exclusive ones, with a softmax over rows of W, or
independent columns with a sigmoid each: multi-hot labels, and the one column that tells two classes apart.

How ours works:
- It searches on the principal axes of the features, which changes neither the models nor their penalty. There, the
  Hessian at the start is close to diagonal and known, so that in units of it a search takes a fraction of the usual
  number of iterations.
- Matrix products are in float32 until that gains nothing more, and then in float64; sums, the penalty and the search
  are in float64 throughout.
- Features may be anywhere, also in a mapped file; blocks of rows come to the device as they are needed.

What is given up: each value of C starts cold and goes through the features by itself, instead of starting where its
neighbour ended or sharing a pass with it. So a model has the same bits whichever others are fitted, and the figures of
a sweep do not depend on how it is divided over processes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("dinov3")

# Temporaries of a block of rows in `fit_with_torch` have about this many elements.
BLOCK_ELEMENTS = 2**20
HISTORY = 10
EVALUATIONS_PER_STEP = 25
ITERATIONS_PER_REPORT = 10
# By the dtype of products: the share of the objective below which a decrease drowns in rounding.
REACHABLE = {torch.float32: 1e-7, torch.float64: 1e-14}
# Where C is large the objective approaches 0, and a share of it would ask for digits of no use to anyone: scikit-learn
# stops at an absolute change. An objective per sample below this counts as this much.
SMALLEST_LOSS_PER_SAMPLE = 0.05
# torch skips updates of the Hessian whose curvature is below 1e-10, so the objective is counted in tiny units.
SCALE = 1e12


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
            warnings.simplefilter("ignore", ConvergenceWarning)  # `converged` says so
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
    dtypes: Sequence[torch.dtype],
    memory_budget_bytes: int,
    report: Callable[[str], None] = lambda note: None,
) -> Iterator[Fit]:
    """Fit a model for each value of C, one after the other, each from the same start.

    Args:
        features: [N, D], on any device.
        targets: classes int64 [N], each of 0..R-1 occurring; or columns [N, R] of 0 and 1, each of both kinds.
        Cs: inverse weights of the penalty.
        device: where the work is done.
        tol: a fit ends when a step to the minimum of the quadratic model would lower the objective by less than this
            share of it (of 0.05 per sample, if it is below), or by less than the products' dtype can resolve.
        max_iterations: of each fit.
        dtypes: of matrix products; a fit continues with the next one when it has converged in the one before.
        memory_budget_bytes: within which features are kept on their principal axes; larger ones are transformed block
            by block in each evaluation.
        report: called from time to time with a few words on the progress of a fit.

    Yields:
        The fits, in the order of `Cs`.
    """
    if not Cs:
        return
    rows = _Rows(features, targets, device, dtypes, memory_budget_bytes)
    for C in Cs:
        point, n_iterations, converged = _minimise(rows, C, tol, max_iterations, dtypes, report)
        weights = point[:, :-1] @ rows.axes.T  # [R, D]
        intercept = point[:, -1] - weights @ rows.mean
        yield Fit(weights.cpu(), intercept.cpu(), n_iterations, converged)


def _minimise(
    rows: _Rows,
    C: float,
    tol: float,
    max_iterations: int,
    dtypes: Sequence[torch.dtype],
    report: Callable[[str], None],
) -> tuple[Tensor, int, bool]:
    # In units in which the Hessian at the start is about the identity, the first step of L-BFGS is Newton's.
    start, hessian = rows.start_and_hessian(C)
    factor = SCALE / len(rows.targets)
    unit = (hessian * factor).rsqrt()
    scaled = torch.nn.Parameter(start / unit)
    evaluated: tuple[torch.dtype, Tensor, float, Tensor] | None = None

    def evaluate() -> float:
        nonlocal evaluated
        # Each call of `step` asks again for the point where the last one ended.
        if evaluated is None or evaluated[0] is not dtype or not torch.equal(evaluated[1], scaled):
            loss, gradient = rows.loss_and_gradient(scaled.detach() * unit, C, dtype)
            evaluated = dtype, scaled.detach().clone(), factor * loss, factor * gradient * unit
        scaled.grad = evaluated[3]
        return evaluated[2]

    optimizer = torch.optim.LBFGS(
        [scaled], max_iter=1, max_eval=EVALUATIONS_PER_STEP, history_size=HISTORY, line_search_fn="strong_wolfe"
    )
    settings, state = optimizer.param_groups[0], optimizer.state[scaled]
    n_iterations, converged = 0, False
    for dtype in dtypes:
        converged = False
        while not converged and n_iterations < max_iterations:
            value = evaluate()
            tolerance = max(tol * max(value, SMALLEST_LOSS_PER_SAMPLE * SCALE), REACHABLE[dtype] * value)
            assert scaled.grad is not None
            # torch would divide the first step by the norm of the gradient.
            lr = max(1.0, float(scaled.grad.abs().sum())) if n_iterations == 0 else 1.0
            settings.update(lr=lr, tolerance_grad=0.0, tolerance_change=tolerance)
            optimizer.step(evaluate)
            # Without a gradient there is no direction.
            converged = "d" not in state or -float(state["prev_flat_grad"].dot(state["d"])) <= tolerance
            n_iterations += not converged
            if n_iterations % ITERATIONS_PER_REPORT == 0:
                report(f"C={C:.2g}, iteration {n_iterations}")
    point = scaled.detach() * unit
    if rows.targets.ndim == 1:
        # A softmax does not depend on what all classes have in common; the penalty is smallest without it.
        point = point - point.mean(dim=0)
    return point, n_iterations, converged


class _Rows:
    # Blocks of features on their principal axes, with their targets. Points of a search are [R, d + 1]: weights on the
    # d axes along which features vary, and the intercept.

    def __init__(
        self,
        features: Tensor,
        targets: Tensor,
        device: torch.device,
        dtypes: Sequence[torch.dtype],
        memory_budget_bytes: int,
    ) -> None:
        self.device = device
        self.n_outputs = int(targets.max()) + 1 if targets.ndim == 1 else targets.shape[1]
        self.targets = targets.to(device)
        size = max(1, BLOCK_ELEMENTS // max(self.n_outputs, features.shape[1]))
        self.blocks = list(features.split(size))
        self.target_blocks = [block.T if block.ndim == 2 else block for block in self.targets.split(size)]
        self.mean = torch.stack([self._load(block).sum(dim=0) for block in self.blocks]).sum(dim=0) / len(features)
        scatter = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=device)
        for block in self.blocks:
            centred = self._load(block) - self.mean
            scatter.addmm_(centred.T, centred)
        variances, axes = torch.linalg.eigh(scatter)
        varies = variances > variances[-1] * len(variances) * torch.finfo(torch.float64).eps
        self.axes = axes[:, varies]  # [D, d]
        n_samples = variances.new_tensor([len(features)])
        self.sums_of_squares = torch.cat([variances[varies], n_samples])  # of the features, and of the intercept's 1
        n_bytes = len(features) * self.axes.shape[1] * sum(dtype.itemsize for dtype in dtypes)
        self.in_memory = n_bytes <= memory_budget_bytes
        if self.in_memory:
            blocks = [self._transform(block) for block in self.blocks]
            self.transformed = {dtype: [block.to(dtype) for block in blocks] for dtype in dtypes}
        else:
            logger.info(
                "logistic regression: %.0f MB of features exceed train.memory_budget_mb=%.0f, so they are read and "
                "transformed in blocks each time, which takes longer",
                n_bytes / 2**20,
                memory_budget_bytes / 2**20,
            )

    def _load(self, block: Tensor) -> Tensor:
        return block.to(self.device, torch.float64)

    def _transform(self, block: Tensor) -> Tensor:
        return (self._load(block) - self.mean) @ self.axes

    def start_and_hessian(self, C: float) -> tuple[Tensor, Tensor]:
        """Return weights 0 with their best intercepts, and the diagonal of the Hessian there, both [R, d + 1]."""
        if self.targets.ndim == 1:
            shares = torch.bincount(self.targets, minlength=self.n_outputs).double() / len(self.targets)
            intercept, curvature = shares.log() - shares.log().mean(), shares
        else:
            shares = self.targets.double().mean(dim=0)
            intercept, curvature = shares.logit(), shares * (1 - shares)
        start = torch.zeros(self.n_outputs, len(self.sums_of_squares), dtype=torch.float64, device=self.device)
        start[:, -1] = intercept
        penalty = torch.full_like(self.sums_of_squares, 1 / C)
        penalty[-1] = 0
        return start, curvature[:, None] * self.sums_of_squares + penalty

    def loss_and_gradient(self, point: Tensor, C: float, dtype: torch.dtype) -> tuple[float, Tensor]:
        """Return the objective and its gradient at a point, with matrix products in `dtype`."""
        penalised = point[:, :-1]
        loss = penalised.square().sum() / (2 * C)
        gradient = F.pad(penalised / C, (0, 1))
        weights, intercept = penalised.to(dtype), point[:, -1:].to(dtype)
        block_loss = _softmax_loss if self.targets.ndim == 1 else _sigmoid_loss
        blocks = self.transformed[dtype] if self.in_memory else (self._transform(b).to(dtype) for b in self.blocks)
        for features, targets in zip(blocks, self.target_blocks, strict=True):
            # Classes first: what follows then runs along rows of samples, which is several times faster.
            block_sum, residuals = block_loss(torch.addmm(intercept, weights, features.T), targets)  # [R, B]
            loss += block_sum
            gradient[:, :-1] += residuals @ features
            gradient[:, -1] += residuals.sum(dim=1, dtype=torch.float64)
        return float(loss), gradient


def _softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    # The loss, summed in float64, and its derivatives by the logits [R, B].
    own = targets[None]
    log_probabilities = logits.log_softmax(dim=0)
    own_log_probabilities = log_probabilities.gather(0, own)
    # Denormal numbers, which slow products down by far, result from exponents below -87.
    probabilities = log_probabilities.clamp_(min=-60).exp_().scatter_(0, own, 0)
    # Of samples that are almost certain, 1 - p is all that is left to learn from: never computed as a difference.
    others = probabilities.sum(dim=0, keepdim=True)
    losses = torch.where(others < 0.1, -torch.log1p(-others), -own_log_probabilities)
    return losses.sum(dtype=torch.float64), probabilities.scatter_(0, own, -others)


def _sigmoid_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    signs = 1 - 2 * targets.to(logits.dtype)
    return F.softplus(signs * logits).sum(dtype=torch.float64), signs * (signs * logits).sigmoid()
