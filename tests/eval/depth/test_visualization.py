"""Pictures of depth maps and saved predictions."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov3.eval.depth.visualization import (
    alpha_blend,
    depth_tensor_to_colorized_pil,
    normalized_tensor_to_pil,
    save_predictions,
)

FIRST, LAST = (12, 7, 134), (239, 248, 33)  # ends of "plasma"


class Extension(Enum):
    JPG = "jpg"
    PNG = "png"
    PTH = "pth"


@dataclass
class ResultConfig:
    extension: Extension = Extension.PNG
    save_resolution: int | None = None
    overlay_alpha: float = 1.0
    save_separate_files: bool = False


def sample() -> tuple[Tensor, Tensor, Tensor]:
    """Normalised image, prediction and measurement; the image is smaller."""
    generator = torch.Generator().manual_seed(0)
    pred, gt = (1 + torch.rand(1, 1, 24, 36, generator=generator) for _ in range(2))
    return torch.randn(1, 3, 12, 18, generator=generator), pred, gt


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_the_range_of_a_map_has_all_colours() -> None:
    image = depth_tensor_to_colorized_pil(torch.linspace(3, 9, 24).view(1, 1, 4, 6))
    assert image.mode == "RGB" and image.size == (6, 4)
    assert (image.getpixel((0, 0)), image.getpixel((5, 3))) == (FIRST, LAST)


def test_given_bounds_replace_those_of_the_map() -> None:
    depth = torch.tensor([[0.0, 1.0, 4.0, 9.0]])
    image = depth_tensor_to_colorized_pil(depth, vmin=1.0, vmax=4.0)
    assert [image.getpixel((x, 0)) for x in range(4)] == [FIRST, FIRST, LAST, LAST]
    equal = depth_tensor_to_colorized_pil(depth, vmin=2.0, vmax=2.0)
    assert {equal.getpixel((x, 0)) for x in range(4)} == {FIRST}


def test_other_colour_maps() -> None:
    gray = depth_tensor_to_colorized_pil(torch.tensor([[0.0, 1.0]]), cmap="gray")
    assert [gray.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), (255, 255, 255)]


def test_pixels_that_are_no_number_are_black() -> None:
    depth = torch.tensor([[1.0, torch.nan, 2.0, torch.inf]])
    image = depth_tensor_to_colorized_pil(depth)
    assert [image.getpixel((x, 0)) for x in range(4)] == [FIRST, (0, 0, 0), LAST, (0, 0, 0)]
    assert not pixels(depth_tensor_to_colorized_pil(torch.full((2, 2), torch.nan))).any()


def test_several_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one depth map.*\(2, 1, 4, 4\)"):
        depth_tensor_to_colorized_pil(torch.ones(2, 1, 4, 4))


def test_a_normalised_image_comes_back() -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    mean, std = (0.420, 0.411, 0.296), (0.213, 0.156, 0.143)
    normalized = (image / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    again = pixels(normalized_tensor_to_pil(normalized[None], mean, std))
    assert abs(again - image.permute(1, 2, 0).int().numpy()).max() <= 1
    assert set(pixels(normalized_tensor_to_pil(torch.full((3, 2, 2), 99.0))).flatten()) == {255}


def test_blending_weighs_the_colours() -> None:
    image, colors = Image.new("RGB", (4, 3), (200, 100, 0)), np.full((3, 4, 3), 50, dtype=np.uint8)
    assert np.array_equal(alpha_blend(image, colors, 0.0), image)
    assert np.array_equal(alpha_blend(image, colors, 1.0), colors)
    assert abs(pixels(alpha_blend(image, colors, 0.25)) - [162.5, 87.5, 12.5]).max() <= 1.5


@pytest.mark.parametrize("extension", [Extension.JPG, Extension.PNG])
def test_prediction_beside_measurement(tmp_path: Path, extension: Extension) -> None:
    img, _, _ = sample()
    pred = torch.linspace(0, 1, 24 * 36).view(1, 1, 24, 36)
    gt = 1 - pred
    save_predictions(img, pred, gt, ResultConfig(extension), tmp_path, 7, depth_tensor_to_colorized_pil)
    assert [path.name for path in tmp_path.rglob("*.*")] == [f"results_7.{extension.value}"]
    both = pixels(Image.open(tmp_path / "visualizations" / f"results_7.{extension.value}"))
    want = np.concatenate([pixels(depth_tensor_to_colorized_pil(x)) for x in (pred, gt)], axis=1)
    assert both.shape == want.shape
    assert abs(both - want).mean() <= (15 if extension is Extension.JPG else 0)


def test_tensors_are_saved_as_they_are(tmp_path: Path) -> None:
    img, pred, gt = sample()
    save_predictions(img, pred[:, :, :6], gt, ResultConfig(Extension.PTH), tmp_path, 3)
    path = tmp_path / "visualizations" / "results_3.pth"
    saved = torch.load(path, weights_only=True)
    assert set(saved) == {"image", "pred", "target"}
    assert torch.equal(saved["image"], img) and torch.equal(saved["pred"], pred[:, :, :6])
    assert torch.equal(saved["target"], gt)
    assert saved["pred"].untyped_storage().nbytes() == 4 * saved["pred"].numel()


def test_pictures_of_a_given_resolution_in_files_of_their_own(tmp_path: Path) -> None:
    config = ResultConfig(save_resolution=48, save_separate_files=True)
    save_predictions(*sample(), config, tmp_path, 0)
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "visualizations").iterdir()}
    one = (72, 48)
    assert sizes == {"results_0.png": (144, 48), "image_0.png": one, "pred_0.png": one, "gt_0.png": one}


def test_maps_are_resized_by_nearest_neighbour(tmp_path: Path) -> None:
    img, pred, gt = sample()
    save_predictions(img, pred, gt, ResultConfig(save_resolution=48, save_separate_files=True), tmp_path, 0)
    enlarged = pixels(Image.open(tmp_path / "visualizations" / "gt_0.png"))
    assert np.array_equal(enlarged, pixels(depth_tensor_to_colorized_pil(gt)).repeat(2, axis=0).repeat(2, axis=1))


def test_an_overlay_shows_the_image_below_the_depth(tmp_path: Path) -> None:
    img, pred, gt = sample()
    save_predictions(img, pred, gt, ResultConfig(overlay_alpha=0.5, save_separate_files=True), tmp_path, 0)
    image = Image.open(tmp_path / "visualizations" / "image_0.png")
    assert image.size == (36, 24)
    want = alpha_blend(image, np.asarray(depth_tensor_to_colorized_pil(pred)), 0.5)
    assert np.array_equal(Image.open(tmp_path / "visualizations" / "pred_0.png"), want)


def test_images_are_shown_with_the_statistics_that_they_were_normalised_with(tmp_path: Path) -> None:
    _, pred, gt = sample()
    config = ResultConfig(save_separate_files=True)
    save_predictions(torch.zeros(1, 3, 24, 36), pred, gt, config, tmp_path, 0, mean=(0.2, 0.4, 0.6), std=(1, 1, 1))
    image = Image.open(tmp_path / "visualizations" / "image_0.png")
    assert abs(pixels(image) - [51, 102, 153]).max() <= 1


def test_matplotlib_is_not_imported_with_the_module() -> None:
    code = "import sys, dinov3.eval.depth.visualization; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
