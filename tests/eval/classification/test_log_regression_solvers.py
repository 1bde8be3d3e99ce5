"""The two solvers of logistic regression."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.classification import log_regression_solvers as solvers

N_CLASSES = 5


def make_rows(n: int = 200, dim: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping classes, on axes of very different length that are far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % N_CLASSES
    centres = torch.randn(N_CLASSES, dim, generator=torch.Generator().manual_seed(1))
    features = centres[labels] + 2 * torch.randn(n, dim, generator=generator)
    return features * torch.logspace(1, -2, dim) + 30, labels


def fit_torch(features: Tensor, targets: Tensor, Cs: list[float], **options: Any) -> list[solvers.Fit]:
    settings: dict[str, Any] = {
        "device": torch.device("cpu"),
        "tol": 1e-12,
        "max_iterations": 1000,
        "dtypes": [torch.float32, torch.float64],
        "memory_budget_bytes": 2**30,
    }
    return list(solvers.fit_with_torch(features, targets, Cs, **settings | options))


def test_gradient_is_large_at_the_start() -> None:
    features, labels = make_rows()
    start = solvers.Fit(torch.zeros(N_CLASSES, 16).double(), torch.zeros(N_CLASSES).double(), 0, True)
    assert gradient_norm(start, features, labels, 1.0) > 1


def objective(fit: solvers.Fit, features: Tensor, targets: Tensor, C: float) -> float:
    logits = features.double() @ fit.weights.T + fit.intercept
    if targets.ndim == 1:
        loss = F.cross_entropy(logits, targets, reduction="sum")
    else:
        loss = F.binary_cross_entropy_with_logits(logits, targets.double(), reduction="sum")
    return float(loss + fit.weights.square().sum() / (2 * C))


def gradient_norm(fit: solvers.Fit, features: Tensor, targets: Tensor, C: float) -> float:
    """Of the weights and intercepts, per sample, where features are centred; at weights 0 it is above 1."""
    centred = features.double() - features.double().mean(dim=0)
    logits = features.double() @ fit.weights.T + fit.intercept
    if targets.ndim == 1:
        residuals = logits.softmax(dim=1) - F.one_hot(targets, logits.shape[1])
    else:
        residuals = logits.sigmoid() - targets
    gradient = torch.cat([residuals.T @ centred + fit.weights / C, residuals.sum(dim=0)[:, None]], dim=1)
    return float(gradient.abs().max()) / len(features)


def binary_targets(labels: Tensor) -> Tensor:
    return (labels >= 3).long()[:, None]


def multi_hot_targets(labels: Tensor) -> Tensor:
    return torch.stack([labels >= 3, labels % 2 == 0, labels == 0], dim=1).long()


@pytest.mark.parametrize("make_targets", [lambda labels: labels, binary_targets, multi_hot_targets])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float64], [torch.float32, torch.float64]])
def test_gradient_vanishes_at_the_solution(make_targets: Any, dtypes: list[torch.dtype]) -> None:
    features, labels = make_rows()
    targets = make_targets(labels)
    Cs = [1e-6, 1e-3, 1.0, 100.0]
    for C, fit in zip(Cs, fit_torch(features, targets, Cs, dtypes=dtypes), strict=True):
        assert fit.converged
        assert gradient_norm(fit, features, targets, C) < (1e-5 if torch.float64 in dtypes else 2e-3)


@pytest.mark.parametrize("make_targets", [lambda labels: labels, binary_targets, multi_hot_targets])
def test_both_solvers_find_the_same_minimum(make_targets: Any) -> None:
    features, labels = make_rows()
    # On axes of one length and around the origin scikit-learn gets there, too.
    features = (features - features.mean(dim=0)) / features.std(dim=0)
    targets = make_targets(labels)
    for C, ours in zip([0.01, 10.0], fit_torch(features, targets, [0.01, 10.0]), strict=True):
        theirs = solvers.fit_with_sklearn(features, targets, C, tol=1e-12, max_iterations=1000, dtype=torch.float64)
        assert theirs.converged
        torch.testing.assert_close(ours.weights, theirs.weights, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(ours.intercept, theirs.intercept, rtol=1e-2, atol=1e-4)
        assert objective(ours, features, targets, C) <= objective(theirs, features, targets, C) * (1 + 1e-11)


def test_no_value_of_C_has_a_worse_minimum_than_scikit_learn() -> None:
    features, labels = make_rows()
    Cs = [1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e5]
    for C, ours in zip(Cs, fit_torch(features, labels, Cs), strict=True):
        theirs = solvers.fit_with_sklearn(features, labels, C, tol=1e-12, max_iterations=300, dtype=torch.float64)
        assert objective(ours, features, labels, C) <= objective(theirs, features, labels, C) * (1 + 1e-11)


def test_a_model_has_the_same_bits_whichever_others_are_fitted_with_it() -> None:
    features, labels = make_rows(dim=7)
    Cs = [10.0**power for power in range(-6, 6)]
    together = fit_torch(features, labels, Cs)
    for part in (Cs[::2], Cs[3:4]):
        for C, fit in zip(part, fit_torch(features, labels, part), strict=True):
            want = together[Cs.index(C)]
            assert torch.equal(fit.weights, want.weights) and torch.equal(fit.intercept, want.intercept)


def test_features_above_the_budget_are_gone_through_in_blocks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    features, labels = make_rows()
    want = fit_torch(features, labels, [1.0])[0]
    assert not caplog.records
    monkeypatch.setattr(solvers, "BLOCK_ELEMENTS", 500)
    with caplog.at_level("INFO", logger="dinov3"):
        got = fit_torch(features, labels, [1.0], memory_budget_bytes=1000)[0]
    assert "in blocks" in caplog.text and "memory_budget_mb" in caplog.text
    torch.testing.assert_close(got.weights, want.weights, rtol=1e-3, atol=1e-5)


def test_fewer_rows_than_dimensions() -> None:
    features, labels = make_rows(n=10, dim=64)
    for C, fit in zip([1e-3, 10.0], fit_torch(features, labels, [1e-3, 10.0]), strict=True):
        assert fit.weights.shape == (N_CLASSES, 64)
        assert gradient_norm(fit, features, labels, C) < 5e-5


def test_constant_and_repeated_features_do_no_harm() -> None:
    features, labels = make_rows(dim=4)
    wide = torch.cat([features, torch.full((len(features), 2), 7.0), features[:, :1]], dim=1)
    fit = fit_torch(wide, labels, [1.0])[0]
    assert fit.weights.isfinite().all()
    assert fit.weights[:, 4:6].abs().max() < 1e-6
    torch.testing.assert_close(fit.weights[:, 0], fit.weights[:, 6])
    same = fit_torch(torch.ones(20, 3), torch.arange(20) % 2, [1.0])[0]
    assert same.weights.abs().max() == 0


def test_rounding_does_not_keep_a_search_going() -> None:
    """Features that hardly vary, and a penalty that leaves almost nothing to be learned of them."""
    features, labels = make_rows(n=1000)
    kept = (labels != 0) | (torch.arange(1000) < 700)  # or the intercepts were all 0
    fits = fit_torch(features[kept] * 1e-6, labels[kept], [1e-6, 1e-4, 1e-2])
    shares = labels[kept].bincount() / kept.sum()
    for fit in fits:
        assert fit.converged and fit.n_iterations <= 3
        assert fit.weights.abs().max() < 1e-2
        torch.testing.assert_close(fit.intercept.softmax(dim=0).float(), shares, rtol=1e-4, atol=0)


def test_rare_classes_keep_their_share() -> None:
    features, labels = make_rows(n=400)
    kept = (labels != 0) | (torch.arange(400) < 10)  # two of the first class
    features, labels = features[kept], labels[kept]
    fit = fit_torch(features, labels, [1e-7])[0]
    shares = fit.intercept.softmax(dim=0)  # with weights near 0
    centred = (features.double() @ fit.weights.T + fit.intercept).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(centred, labels.bincount() / len(labels), rtol=1e-3, atol=1e-5, check_dtype=False)
    assert shares[0] < 0.1


def test_reaching_the_limit_of_iterations_is_reported() -> None:
    features, labels = make_rows()
    fits = fit_torch(features, labels, [1e-6, 1e4], max_iterations=4)
    assert [fit.converged for fit in fits] == [True, False]
    assert fits[1].n_iterations == 4
    theirs = solvers.fit_with_sklearn(features, labels, 1e4, tol=1e-12, max_iterations=4, dtype=torch.float64)
    assert not theirs.converged


def test_what_all_classes_have_in_common_is_taken_out() -> None:
    features, labels = make_rows(n=400)
    kept = (labels != 0) | (torch.arange(400) < 50)  # with equal shares the search would never leave a mean of 0
    fit = fit_torch(features[kept], labels[kept], [1.0])[0]
    assert fit.weights.mean(dim=0).abs().max() < 1e-12
    assert abs(float((fit.intercept + fit.weights @ features[kept].double().mean(dim=0)).mean())) < 1e-9


def test_samples_that_are_almost_certain_keep_their_loss_and_residuals() -> None:
    logits = torch.tensor([[20.0, 0.0, 1.0], [-3.0, 15.0, 0.0], [100.0, 5.0, 0.0]])
    targets = torch.tensor([0, 1, 0])
    loss, residuals = solvers._softmax_loss(logits.mT.contiguous(), targets)
    exact_loss, exact = solvers._softmax_loss(logits.double().mT.contiguous(), targets)
    reference = logits.double().requires_grad_()
    F.cross_entropy(reference, targets, reduction="sum").backward()
    assert reference.grad is not None
    torch.testing.assert_close(exact.mT[:2], reference.grad[:2], rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, exact_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(residuals.double(), exact, rtol=1e-5, atol=0)
    # Denormal numbers would slow down the products that follow.
    assert residuals.abs().min() >= torch.finfo(torch.float32).tiny


def test_repeated_features_of_great_length_leave_the_hessian_positive() -> None:
    features, labels = make_rows(dim=4)
    wide = (features - features.mean(dim=0)).repeat(1, 8).double() * 1e6
    fit = fit_torch(wide, labels, [1e5], dtypes=[torch.float64])[0]
    assert fit.weights.isfinite().all() and fit.weights.abs().max() > 0
