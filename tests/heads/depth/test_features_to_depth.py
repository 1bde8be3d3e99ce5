"""From logits to metres, beside the weights and bins written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.heads.depth import features_to_depth
from dinov3.heads.depth.features_to_depth import (
    FeaturesToDepth,
    create_chmv2_mixlog_bins,
    create_outputs_with_chmv2_mixlog_norm,
)

BINS, NORMS = ("linear", "log", "chmv2_mixlog"), ("linear", "softmax", "sigmoid", "chmv2_mixlog")


def logits(k: int = 16, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(2, k, 3, 5, generator=torch.Generator().manual_seed(0))


def bins_of(strategy: str, a: float, m: float, k: int) -> Tensor:
    def linear(a: float, m: float) -> Tensor:
        return torch.linspace(a, m, k, dtype=torch.float64)

    def log(a: float, m: float) -> Tensor:
        return torch.linspace(torch.tensor(a).double().log(), torch.tensor(m).double().log(), k).double().exp()

    if strategy == "chmv2_mixlog":
        t = torch.linspace(1, 0, k, dtype=torch.float64)
        return t * log(a, m / 8) + (1 - t) * linear(a, m / 8)
    return linear(a, m) if strategy == "linear" else log(a, m)


def by_definition(x: Tensor, bins: Tensor, norm: str) -> Tensor:
    x, bins = x.double(), bins[:, None, None]
    if norm == "chmv2_mixlog":
        shifted = x.relu() + 1e-8
        total = shifted.sum(1, keepdim=True)
        total = torch.where(total.isfinite(), total, 1.0).clamp(min=1e-12)
        return 8 * (shifted / total * bins.clamp(min=1e-12)).sum(1, keepdim=True).clamp(min=1e-12)
    weights = {"linear": x.relu() + 0.1, "softmax": x.exp(), "sigmoid": x.sigmoid()}[norm]
    return (weights / weights.sum(1, keepdim=True) * bins).sum(1, keepdim=True)


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("norm", NORMS)
def test_depth_is_that_of_the_definition(bins: str, norm: str) -> None:
    depth = FeaturesToDepth(0.01, 40.0, bins, norm)(logits())
    assert depth.shape == (2, 1, 3, 5) and depth.dtype == torch.float32
    want = by_definition(logits(), bins_of(bins, 0.01, 40.0, 16), norm).float()
    torch.testing.assert_close(depth, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_those_of_the_definition(norm: str) -> None:
    x, y = logits().requires_grad_(), logits().requires_grad_()
    FeaturesToDepth(0.01, 40.0, "log", norm)(x).square().sum().backward()
    by_definition(y, bins_of("log", 0.01, 40.0, 16), norm).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-3)


def test_one_channel_is_the_depth_itself() -> None:
    x = logits(1)
    torch.testing.assert_close(FeaturesToDepth(0.25, 5.0, "log", "softmax")(x), x.relu() + 0.25)


def test_without_positive_logits_depth_is_the_mean_of_the_bins() -> None:
    x = -logits().abs() - 0.5
    for norm, factor in (("linear", 1), ("chmv2_mixlog", 8)):
        depth = FeaturesToDepth(0.01, 40.0, "log", norm)(x)
        mean = bins_of("log", 0.01, 40.0, 16).mean().item()
        assert depth.flatten().tolist() == pytest.approx([factor * mean] * 30, rel=1e-5)


def test_least_canopy_height() -> None:
    x = torch.zeros(1, 256, 1, 1)
    x[:, 0] = 1e9
    assert FeaturesToDepth(0.001, 96.0, "chmv2_mixlog", "chmv2_mixlog")(x).item() == pytest.approx(0.008, rel=1e-4)


@pytest.mark.parametrize(
    "special",
    [
        {0: float("nan")},
        {3: float("inf")},
        {3: float("-inf")},
        {2: 3e38, 5: 3e38},  # finite, but their sum is not
        {2: 1e37, 5: 1e37},
        dict.fromkeys(range(8), 0.0),
    ],
)
@pytest.mark.parametrize("bins", BINS)
def test_canopy_height_of_sums_that_overflow(special: dict[int, float], bins: str) -> None:
    x = torch.rand(1, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    for k, value in special.items():
        x[0, k, 0, 1] = value
    # In float32, where sums overflow.
    shifted, centres = x.relu() + 1e-8, bins_of(bins, 0.01, 40.0, 8).float()[:, None, None]
    total = shifted.sum(1, keepdim=True)
    total = torch.where(total.isfinite(), total, 1.0).clamp(min=1e-12)
    want = 8 * (shifted / total * centres).sum(1, keepdim=True).clamp(min=1e-12)
    depth = FeaturesToDepth(0.01, 40.0, bins, "chmv2_mixlog")(x)
    torch.testing.assert_close(depth, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    outputs = create_outputs_with_chmv2_mixlog_norm(x, centres.flatten())
    torch.testing.assert_close(outputs, depth, equal_nan=True)


@pytest.mark.parametrize("norm", NORMS)
def test_float32_whatever_autocast_says(norm: str) -> None:
    to_depth, x = FeaturesToDepth(0.01, 40.0, "chmv2_mixlog", norm), logits()
    want = to_depth(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(to_depth(x), want)
        assert torch.equal(to_depth(x.bfloat16()), FeaturesToDepth.forward(to_depth, x.bfloat16().float()))
        outputs = create_outputs_with_chmv2_mixlog_norm(x.bfloat16(), torch.linspace(0.1, 3, 16))
    assert outputs.dtype == torch.float32


def test_layout_of_the_logits_does_not_matter() -> None:
    to_depth, x = FeaturesToDepth(0.001, 80.0), logits()
    torch.testing.assert_close(to_depth(x.contiguous(memory_format=torch.channels_last)), to_depth(x))


def test_bins_are_made_once_for_each_number(monkeypatch: pytest.MonkeyPatch) -> None:
    made, original = [], features_to_depth._BINS["log"]

    def record(*arguments: Any) -> Tensor:
        made.append(arguments)
        return original(*arguments)

    monkeypatch.setitem(features_to_depth._BINS, "log", record)
    to_depth = FeaturesToDepth(0.01, 40.0, "log")
    for k in (16, 16, 8, 16):
        to_depth(logits(k))
    assert [arguments[:3] for arguments in made] == [(0.01, 40.0, 16), (0.01, 40.0, 8)]
    assert not to_depth.state_dict()
    assert copy.deepcopy(to_depth)(logits()).equal(to_depth(logits()))


def test_bins_that_were_made_in_inference_mode_serve_training() -> None:
    to_depth, x = FeaturesToDepth(0.01, 40.0), logits()
    with torch.inference_mode():
        to_depth(x)
    to_depth(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_only_the_two_of_chmv2_belong_together(caplog: pytest.LogCaptureFixture) -> None:
    for bins in BINS:
        for norm in NORMS:
            caplog.clear()
            FeaturesToDepth(0.01, 40.0, bins, norm)
            is_mixture = (bins == "chmv2_mixlog") != (norm == "chmv2_mixlog")
            assert ("off by a factor of 8" in caplog.text) == is_mixture


def test_mixed_bins_start_logarithmic_and_end_linear() -> None:
    bins = create_chmv2_mixlog_bins(0.001, 96.0, 256, "cpu")
    torch.testing.assert_close(bins, bins_of("chmv2_mixlog", 0.001, 96.0, 256).float(), rtol=1e-5, atol=1e-7)
    assert bins.dtype == torch.float32 and bins[0].item() == pytest.approx(0.001) and bins[-1].item() == 12


def test_on_the_meta_device() -> None:
    assert FeaturesToDepth()(torch.empty(2, 16, 3, 5, device="meta")).shape == (2, 1, 3, 5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bins_strategy": "lin"}, "bins_strategy='lin'.*: choose one of linear, log, chmv2_mixlog"),
        (
            {"norm_strategy": "sofmax"},
            r"norm_strategy='sofmax' \(did you mean 'softmax'\?\): choose one of linear, softmax",
        ),
        ({"min_depth": 10, "max_depth": 1}, "min_depth=10, max_depth=1: expected 0 <= min_depth < max_depth"),
        ({"min_depth": -1}, "min_depth=-1"),
        ({"min_depth": 0, "bins_strategy": "log"}, "min_depth=0 has no logarithm: bins_strategy='log'"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeaturesToDepth(**kwargs)
