"""Figures of patch features: principal components as colours, and similarity to a marked patch.

Features are the patch tokens of the last block after the final norm. Thanks to RoPE a backbone that was trained on
small crops takes photos of many more patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from torch import nn

from dinov3.data import make_classification_eval_transform

PATCHES_ON_SHORT_SIDE = 48
MAX_ASPECT_RATIO = 2.0  # of a photo in a figure; longer ones are cropped
FIGURE_WIDTH = 17.0  # inches
DPI = 120
MARK_COLOUR = "#ff2d55"


@dataclass
class Photo:
    """A photo of a figure.

    Attributes:
        title: shown above it.
        image: RGB.
        mark: a point in shares of width and height.
    """

    title: str
    image: Image.Image
    mark: tuple[float, float] = (0.5, 0.5)


def fit_to_patches(image: Image.Image, patch_size: int, short_side: int = PATCHES_ON_SHORT_SIDE) -> Image.Image:
    """Resize an image so that both sides are whole patches, the shorter one `short_side` of them.

    Args:
        image: RGB; cropped to its centre if it is longer than `MAX_ASPECT_RATIO` allows.
        patch_size: in pixels.
        short_side: in patches.
    """
    longest = round(MAX_ASPECT_RATIO * min(image.size))
    width, height = min(image.width, longest), min(image.height, longest)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    scale = short_side / min(width, height)
    size = (round(width * scale) * patch_size, round(height * scale) * patch_size)
    return image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


@torch.inference_mode()
def patch_features(model: nn.Module, image: Image.Image) -> np.ndarray:
    """Compute the patch features of an image.

    Args:
        model: a ViT.
        image: RGB, with sides that are multiples of the patch (see `fit_to_patches`).

    Returns:
        float32 [h, w, D].
    """
    # The short side has this size already, so that nothing is resized or cropped.
    transform = make_classification_eval_transform(resize_size=min(image.size), crop_size=None)
    device = next(model.parameters()).device
    (tokens,) = model.get_intermediate_layers(transform(image)[None].to(device), n=1, reshape=True)  # type: ignore
    return tokens[0].permute(1, 2, 0).float().cpu().numpy()  # [h, w, D]


def pca_colours(features: np.ndarray) -> np.ndarray:
    """Turn the first three principal components of patch features into red, green and blue.

    Args:
        features: [h, w, D], h * w of at least 3.

    Returns:
        float [h, w, 3] in 0..1. Components are whitened; their signs are fixed, so that the same features always have
        the same colours.
    """
    from sklearn.decomposition import PCA

    rows = features.reshape(-1, features.shape[-1])
    components = PCA(n_components=3, whiten=True, svd_solver="full").fit_transform(rows)
    # The sign of a component is arbitrary: make its heavier tail positive.
    components *= np.where((components**3).sum(axis=0) < 0, -1.0, 1.0)
    colours = 1 / (1 + np.exp(-2 * components))
    return colours.reshape(*features.shape[:2], 3)


def similarity_map(features: np.ndarray, mark: tuple[float, float]) -> np.ndarray:
    """Compute the cosine similarity of every patch with the marked one.

    Args:
        features: [h, w, D].
        mark: a point in shares of width and height, 0 to 1.

    Returns:
        float [h, w] in -1..1.
    """
    row, column = marked_patch(features.shape[:2], mark)
    normalised = features / np.linalg.norm(features, axis=-1, keepdims=True).clip(min=1e-12)
    return normalised @ normalised[row, column]


def marked_patch(grid: Sequence[int], mark: tuple[float, float]) -> tuple[int, int]:
    """Return row and column of the patch under a point given in shares of width and height."""
    rows, columns = grid
    return min(int(mark[1] * rows), rows - 1), min(int(mark[0] * columns), columns - 1)


def draw_pca(photos: Sequence[Photo], models: Mapping[str, nn.Module], path: Path, *, title: str) -> Path:
    """Draw a column per photo: the photo, and below it the principal components of each model's patch features.

    Args:
        photos: at least one.
        models: ViTs of one patch size, by the label of their row.
        path: the PNG to write.
        title: of the figure.

    Returns:
        `path`.
    """
    figure, grid, fitted = _make_grid(photos, models, title, inches_below=0.05)
    for row, model in enumerate(models.values(), start=1):
        for axes, image in zip(grid[row], fitted, strict=True):
            axes.imshow(pca_colours(patch_features(model, image)), interpolation="nearest")
    figure.savefig(path, dpi=DPI)
    return path


def draw_similarity(photos: Sequence[Photo], models: Mapping[str, nn.Module], path: Path, *, title: str) -> Path:
    """Draw a column per photo: the photo with its marked patch, and below it each model's similarity to that patch.

    The arguments are those of `draw_pca`.
    """
    figure, grid, fitted = _make_grid(photos, models, title, inches_below=0.2)
    for axes, photo in zip(grid[0], photos, strict=True):
        left, right = axes.get_xlim()
        bottom, top = axes.get_ylim()
        x, y = left + photo.mark[0] * (right - left), top + photo.mark[1] * (bottom - top)
        axes.plot(x, y, marker="+", markersize=15, markeredgewidth=4.5, color="white")
        axes.plot(x, y, marker="+", markersize=13, markeredgewidth=2.2, color=MARK_COLOUR)
    for row, model in enumerate(models.values(), start=1):
        for axes, photo, image in zip(grid[row], photos, fitted, strict=True):
            similarity = similarity_map(patch_features(model, image), photo.mark)
            # Most patches of a small model are alike: stretch over what there is.
            low = float(np.quantile(similarity, 0.02))
            axes.imshow(similarity, cmap="magma", vmin=low, vmax=1.0, interpolation="nearest")
            axes.set_xlabel(f"from {low:.2f} (dark) to 1 (bright)", fontsize=8, labelpad=2)
    figure.savefig(path, dpi=DPI)
    return path


def _make_grid(
    photos: Sequence[Photo], models: Mapping[str, nn.Module], title: str, *, inches_below: float
) -> tuple[Figure, list[list[Axes]], list[Image.Image]]:
    # Draws the photos in row 0, and also returns them as the models see them.
    patch_sizes = {int(model.patch_size) for model in models.values()}  # type: ignore[arg-type]
    if len(patch_sizes) != 1:
        raise ValueError(f"the models of one figure must have one patch size, not {sorted(patch_sizes)}")
    fitted = [fit_to_patches(photo.image, *patch_sizes) for photo in photos]
    widths = [image.width / image.height for image in fitted]
    column_height = FIGURE_WIDTH / sum(widths)
    # Otherwise a few narrow photos would become gigantic.
    width = FIGURE_WIDTH * min(1.0, 4.0 / column_height)
    height = (0.96 * width / sum(widths) + inches_below) * (1 + len(models)) + 0.75
    engine = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(width, height), layout=engine)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    grid: Any = figure.subplots(1 + len(models), len(photos), squeeze=False, width_ratios=widths)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    for axes, photo, image in zip(grid[0], photos, fitted, strict=True):
        # The part that the models see, at the photo's own resolution.
        sharp = fit_to_patches(photo.image, 1, short_side=min(photo.image.size))
        axes.imshow(sharp, extent=(0, image.width, image.height, 0))
        axes.set_title(photo.title, fontsize=10)
    for axes, name in zip(grid[:, 0], ["photo", *models], strict=True):
        axes.set_ylabel(name, fontsize=11)
    return figure, grid.tolist(), fitted
