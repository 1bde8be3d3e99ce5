"""Measuring a depth model, on stand-ins for model and images, and its saved predictions."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dinov3.eval.dense.pictures import alpha_blend, depth_tensor_to_colorized_pil
from dinov3.eval.depth.config import Extension, ResultConfig
from dinov3.eval.depth.eval import evaluate_depther_with_dataloader, save_predictions
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
    assert "predictions of 1 images are not finite" in caplog.text and "images 1\n" in caplog.text
    assert "no pixel that counts" not in caplog.text


def test_nothing_but_such_predictions_is_no_lack_of_measurements(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        results = evaluate([torch.full((1, 3, 4, 6), torch.nan)])
    assert math.isnan(results["rmse"][0])
    with pytest.raises(ValueError, match="none of 1 depth maps has a pixel that counts"):
        evaluate([torch.full((1, 3, 4, 6), torch.nan)], depth=0.0)


def sample() -> tuple[Tensor, Tensor, Tensor]:
    """Normalised image, prediction and measurement; the image is smaller."""
    generator = torch.Generator().manual_seed(0)
    pred, gt = (1 + torch.rand(1, 1, 24, 36, generator=generator) for _ in range(2))
    return torch.randn(1, 3, 12, 18, generator=generator), pred, gt


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("extension", [Extension.JPG, Extension.PNG])
def test_prediction_beside_measurement(tmp_path: Path, extension: Extension) -> None:
    img, _, _ = sample()
    pred = torch.linspace(0, 1, 24 * 36).view(1, 1, 24, 36)
    gt = 1 - pred
    save_predictions(img, pred, gt, ResultConfig(extension=extension), tmp_path, 7)
    assert [path.name for path in tmp_path.rglob("*.*")] == [f"results_7.{extension.value}"]
    both = pixels(Image.open(tmp_path / "visualizations" / f"results_7.{extension.value}"))
    want = np.concatenate([pixels(depth_tensor_to_colorized_pil(x)) for x in (pred, gt)], axis=1)
    assert both.shape == want.shape
    assert abs(both - want).mean() <= (15 if extension is Extension.JPG else 0)


def test_tensors_are_saved_as_they_are(tmp_path: Path) -> None:
    img, pred, gt = sample()
    save_predictions(img, pred[:, :, :6], gt, ResultConfig(extension=Extension.PTH), tmp_path, 3)
    path = tmp_path / "visualizations" / "results_3.pth"
    saved = torch.load(path, weights_only=True)
    assert set(saved) == {"image", "pred", "target"}
    assert torch.equal(saved["image"], img) and torch.equal(saved["pred"], pred[:, :, :6])
    assert torch.equal(saved["target"], gt)
    assert saved["pred"].untyped_storage().nbytes() == 4 * saved["pred"].numel()


def test_pictures_of_a_given_resolution_in_files_of_their_own(tmp_path: Path) -> None:
    config = ResultConfig(extension=Extension.PNG, save_resolution=48, save_separate_files=True)
    save_predictions(*sample(), config, tmp_path, 0)
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "visualizations").iterdir()}
    one = (72, 48)
    assert sizes == {"results_0.png": (144, 48), "image_0.png": one, "pred_0.png": one, "gt_0.png": one}


def test_maps_are_resized_by_nearest_neighbour(tmp_path: Path) -> None:
    img, pred, gt = sample()
    save_predictions(
        img, pred, gt, ResultConfig(extension=Extension.PNG, save_resolution=48, save_separate_files=True), tmp_path, 0
    )
    enlarged = pixels(Image.open(tmp_path / "visualizations" / "gt_0.png"))
    assert np.array_equal(enlarged, pixels(depth_tensor_to_colorized_pil(gt)).repeat(2, axis=0).repeat(2, axis=1))


def test_an_overlay_shows_the_image_below_the_depth(tmp_path: Path) -> None:
    img, pred, gt = sample()
    save_predictions(
        img, pred, gt, ResultConfig(extension=Extension.PNG, overlay_alpha=0.5, save_separate_files=True), tmp_path, 0
    )
    image = Image.open(tmp_path / "visualizations" / "image_0.png")
    assert image.size == (36, 24)
    want = alpha_blend(image, np.asarray(depth_tensor_to_colorized_pil(pred)), 0.5)
    assert np.array_equal(Image.open(tmp_path / "visualizations" / "pred_0.png"), want)


def test_images_are_shown_with_the_statistics_that_they_were_normalised_with(tmp_path: Path) -> None:
    _, pred, gt = sample()
    config = ResultConfig(extension=Extension.PNG, save_separate_files=True)
    save_predictions(torch.zeros(1, 3, 24, 36), pred, gt, config, tmp_path, 0, mean=(0.2, 0.4, 0.6), std=(1, 1, 1))
    image = Image.open(tmp_path / "visualizations" / "image_0.png")
    assert abs(pixels(image) - [51, 102, 153]).max() <= 1
