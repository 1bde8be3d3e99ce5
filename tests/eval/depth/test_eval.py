"""Measuring a depth model, on stand-ins for model and images."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor, nn

from dinov3.eval.depth.config import ResultConfig
from dinov3.eval.depth.eval import evaluate_depther_with_dataloader
from dinov3.eval.depth.metrics import DEPTH_METRICS


class FirstChannel(nn.Module):
    """Predicts what the first channel of the image holds."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]


def evaluate(images: list[Tensor], depth: float = 2.0) -> dict[str, list[float]]:
    rmse = [metric for metric in DEPTH_METRICS if metric.name == "rmse"]
    items = [([image], (torch.tensor([i]), [torch.full((1, 1, 4, 6), depth)])) for i, image in enumerate(images)]
    results, _, _ = evaluate_depther_with_dataloader(
        items, FirstChannel(), "cpu", rmse, (0.001, 10.0), ResultConfig(), reduce_results=False
    )
    return results  # type: ignore[return-value]


def test_predictions_that_are_no_numbers_are_reported_as_such(caplog: pytest.LogCaptureFixture) -> None:
    good, broken = torch.full((1, 3, 4, 6), 2.5), torch.full((1, 3, 4, 6), 2.5)
    broken[..., 2, 3] = torch.nan
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        results = evaluate([good, broken])
    assert results["rmse"][0] == pytest.approx(0.5) and math.isnan(results["rmse"][1])
    assert "predictions of 1 images" in caplog.text and "[1]" in caplog.text
    assert "no pixel that counts" not in caplog.text


def test_nothing_but_such_predictions_is_no_lack_of_measurements(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        results = evaluate([torch.full((1, 3, 4, 6), torch.nan)])
    assert math.isnan(results["rmse"][0])
    with pytest.raises(ValueError, match="none of 1 depth maps has a pixel that counts"):
        evaluate([torch.full((1, 3, 4, 6), torch.nan)], depth=0.0)
