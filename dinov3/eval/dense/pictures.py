"""Pictures of predictions: a depth map with its scale, and a map of classes over the photo with its legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

DPI = 72  # so that one point is one pixel, and all sizes below are in pixels
MIN_SIDE = 320  # of the longer side of a map; smaller ones are enlarged, so that the text can be read
MIN_TEXT = 13
TEXT_SHARE = 0.03  # height of the text over the geometric mean of the sides of a map
WIDE = 1.6  # width over height from which on a photo stands above its map, and a legend below it
MAX_LEGEND_ROWS = 5  # below a wide map
MAX_NAME_LENGTH = 32  # characters
OVERLAY_ALPHA = 0.6  # weight of the colours over the photo
UNKNOWN = "#808080"

# Okabe and Ito's colours, which colour-blind people can distinguish.
_FIRST_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00")
_MAX_COLOURS = 256


def depth_picture(depth: np.ndarray, *, image: Image.Image, limits: tuple[float, float] | None = None) -> Image.Image:
    """Draw a depth map in colours, beside the photo (or below it, if it is wide), with a scale.

    Args:
        depth: [H, W], metres. What is not positive or not finite is unknown and gray.
        image: the photo, stretched to the size of the map.
        limits: depths of the first and the last colour, which depths beyond them have too. Default: the 1st and the
            99th percentile of the map.

    Returns:
        An RGB image.

    Raises:
        ValueError: the map is not [H, W], or the limits do not rise.
    """
    _check_map(depth, "depth")
    is_known = np.isfinite(depth) & (depth > 0)
    low, high = _robust_limits(depth[is_known]) if limits is None else limits
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"limits={limits}: expected two numbers, the first one smaller than the second")
    height, width, text = _layout(depth.shape)
    gap, is_wide = text // 2, width >= WIDE * height
    left, top = (gap, height + 2 * gap) if is_wide else (width + 2 * gap, gap)
    figure = _new_figure(left + width + 10 * text, top + height + gap)
    _add_axes(figure, gap, gap, width, height).imshow(image.convert("RGB").resize((width, height)), aspect="auto")
    mapped = _add_axes(figure, left, top, width, height).imshow(
        np.ma.masked_array(depth, ~is_known),
        cmap=matplotlib.colormaps["plasma"].with_extremes(bad=UNKNOWN),
        norm=Normalize(low, high),
        interpolation="nearest",
        aspect="auto",
    )
    if is_known.any():
        bar = figure.colorbar(
            mapped,
            cax=_add_axes(figure, left + width + gap, top, 1.2 * text, height),
            # With 1, 2 and 5 the ticks are round; more than seven, or less than 2.5 lines apart, are hard to read.
            ticks=MaxNLocator(min(7, max(2, int(height / (2.5 * text)))), steps=[1, 2, 5, 10]),
            format=_MetreFormatter(),
        )
        bar.ax.tick_params(labelsize=text, length=text // 3, width=max(1, text // 12))
        bar.outline.set_visible(False)
    return _render(figure, gap)


def heat_picture(values: np.ndarray, *, image: Image.Image, title: str) -> Image.Image:
    """Draw a map of any values in colours, half transparent over the photo, with a scale.

    Args:
        values: [H, W], finite.
        image: the photo, stretched to the size of the map.
        title: what the values are of, above the picture.

    Returns:
        An RGB image.

    Raises:
        ValueError: the map is not [H, W].
    """
    _check_map(values, "values")
    height, width, text = _layout(values.shape)
    gap = text // 2
    top = 2 * text + gap
    figure = _new_figure(max(width + 10 * text, (MAX_NAME_LENGTH + 2) * text), top + height + 2 * gap)
    axes = _add_axes(figure, gap, top, width, height)
    axes.imshow(image.convert("RGB").resize((width, height)), aspect="auto")
    mapped = axes.imshow(
        values, cmap="turbo", alpha=OVERLAY_ALPHA, extent=(-0.5, width - 0.5, height - 0.5, -0.5), aspect="auto"
    )
    axes.set_title(_shorten(title), fontsize=text, loc="left", parse_math=False)
    bar = figure.colorbar(
        ScalarMappable(mapped.norm, mapped.cmap),  # without the transparency of the map
        cax=_add_axes(figure, gap + width + gap, top, 1.2 * text, height),
        ticks=MaxNLocator(min(7, max(2, int(height / (2.5 * text)))), steps=[1, 2, 5, 10]),
    )
    bar.ax.tick_params(labelsize=text, length=text // 3, width=max(1, text // 12))
    bar.outline.set_visible(False)
    return _render(figure, gap)


class _MetreFormatter(ScalarFormatter):
    # All ticks have the same number of decimals, as the base class finds it, and no factor beside the axis.
    def __init__(self) -> None:
        super().__init__(useOffset=False)
        self.set_scientific(False)

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{super().__call__(x, pos)} m"


def segmentation_picture(
    labels: np.ndarray, *, class_names: Sequence[str], image: Image.Image | None = None
) -> Image.Image:
    """Draw a map of classes in colours over the photo, with a legend of the classes that occur.

    Args:
        labels: integers [H, W], indices of `class_names`; others, e.g. 255, are no class and leave the photo as it is.
        class_names: by class index.
        image: the photo, stretched to the size of the map. Default: only the colours are drawn.

    Returns:
        An RGB image. The legend, which begins with the classes of the largest areas, is to the right of the map, or
        below it if the map is wide. Classes for which there is no room are counted.

    Raises:
        ValueError: the map is not [H, W] of integers.
    """
    _check_map(labels, "labels")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels: expected integers, class indices, not {labels.dtype}")
    has_class = (labels >= 0) & (labels < len(class_names))
    colours = class_colors(len(class_names))
    overlay = np.zeros((*labels.shape, 4), np.uint8)
    overlay[has_class, :3] = colours[labels[has_class]]
    overlay[has_class, 3] = 255 if image is None else round(255 * OVERLAY_ALPHA)
    under = Image.new("RGB", (1, 1), UNKNOWN) if image is None else image.convert("RGB")

    height, width, text = _layout(labels.shape)
    gap, is_wide = text // 2, width >= WIDE * height
    left, top = (gap, height + 2 * gap) if is_wide else (width + 2 * gap, gap)
    figure = _new_figure(left + width + (MAX_NAME_LENGTH + 10) * text, top + height + (MAX_LEGEND_ROWS + 3) * text)
    axes = _add_axes(figure, gap, gap, width, height)
    axes.imshow(under.resize((width, height)), aspect="auto")
    # The same extent, because a small map is enlarged here.
    axes.imshow(overlay, interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5), aspect="auto")

    areas = np.bincount(labels[has_class], minlength=len(class_names))
    order = [index for index in np.argsort(-areas, kind="stable") if areas[index]]
    names = [f"{_percent(areas[index] / labels.size)}  {_shorten(class_names[index])}" for index in order]
    # An average letter is about 0.6 of the font size wide; 4 more are for the swatch and what separates columns.
    column = text * (4 + 0.6 * max(map(len, names), default=0))
    n_columns = max(1, int(width // column)) if is_wide else 1
    n_rows = MAX_LEGEND_ROWS if is_wide else max(2, int(height // (1.5 * text)))
    entries = [(name, to_hex(colours[index] / 255)) for name, index in zip(names, order, strict=True)]
    _add_legend(figure, left, top, entries, text=text, n_columns=n_columns, n_rows=n_rows)
    return _render(figure, gap)


def _add_legend(
    figure: Figure,
    left: float,
    top: float,
    entries: list[tuple[str, str]],
    *,
    text: int,
    n_columns: int,
    n_rows: int,
) -> None:
    n_shown = len(entries) if len(entries) <= n_rows * n_columns else n_rows * n_columns - 1
    shown = [
        Patch(facecolor=colour, edgecolor="black", linewidth=max(1, text // 12), label=label)
        for label, colour in entries[:n_shown]
    ]
    if n_shown < len(entries):
        shown.append(Patch(facecolor="none", edgecolor="none", label=f"+{len(entries) - n_shown} more"))
    legend = figure.legend(
        handles=shown,
        loc="upper left",
        bbox_to_anchor=(left / figure.bbox.width, 1 - top / figure.bbox.height),
        ncols=n_columns,
        fontsize=text,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1,
        handleheight=1,
        labelspacing=0.4,
        handletextpad=0.5,
    )
    for label in legend.get_texts():
        label.set_parse_math(False)  # a dollar sign in a name is a dollar sign


def class_colors(n: int) -> np.ndarray:
    """Return colours for `n` classes, RGB uint8 [n, 3]; those of fewer classes are the first of those of more.

    They repeat after 256.
    """
    return _distinct_colours()[np.arange(n) % _MAX_COLOURS]


@lru_cache(maxsize=1)
def _distinct_colours() -> np.ndarray:
    # Each next one is the candidate whose nearest colour so far is the farthest, to the eye.
    levels = np.linspace(0, 255, 12).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    # Neither paper nor ink, nor the gray of what is unknown.
    lab = _lab(candidates)
    is_colourful = (lab[:, 0] > 25) & (lab[:, 0] < 92) & (np.hypot(lab[:, 1], lab[:, 2]) > 18)
    candidates, lab = candidates[is_colourful], lab[is_colourful]
    chosen = list((255 * to_rgba_array(_FIRST_COLOURS)[:, :3]).round())
    nearest = np.min([np.linalg.norm(lab - _lab(colour), axis=1) for colour in chosen], axis=0)
    while len(chosen) < _MAX_COLOURS:
        best = int(nearest.argmax())
        chosen.append(candidates[best])
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[best], axis=1))
    return np.array(chosen).astype(np.uint8)


def _lab(rgb: np.ndarray) -> np.ndarray:
    # CIE L*a*b* of sRGB in 0..255 under D65: distances in it are about those that the eye sees.
    share = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / to_xyz.sum(axis=1)  # white is 1, 1, 1
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def depth_tensor_to_colorized_pil(
    depth: Tensor, cmap: str = "plasma", vmin: float | None = None, vmax: float | None = None
) -> Image.Image:
    """Convert a depth map to the colours of a matplotlib colormap, pixel by pixel.

    Args:
        depth: [..., H, W], of one image.
        cmap: name of the colormap.
        vmin: depth of its first colour. Default: the smallest depth.
        vmax: depth of its last colour. Default: the largest depth. If it equals `vmin`, all pixels get the first
            colour.

    Returns:
        An RGB image. NaN and infinite pixels are black.

    Raises:
        ValueError: there is more than one map.
    """
    if depth.ndim < 2 or depth.shape[:-2].numel() != 1:
        raise ValueError(f"expected one depth map, [1, 1, H, W], [1, H, W] or [H, W], got shape {tuple(depth.shape)}")
    values = np.ma.masked_invalid(depth.detach().float().cpu().reshape(depth.shape[-2:]).numpy())  # [H, W]
    shares = Normalize(vmin, vmax)(values)
    return Image.fromarray(np.ascontiguousarray(matplotlib.colormaps[cmap](shares, bytes=True)[..., :3]))


def normalized_tensor_to_pil(
    t: Tensor, mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> Image.Image:
    """Convert the input of a model, [3, H, W] or [1, 3, H, W], back to the RGB image that it shows.

    Args:
        t: normalised with `mean` and `std`; values outside [0, 1] are clipped.
        mean: per channel, of values in [0, 1].
        std: per channel.
    """
    t = t.detach().float().cpu().reshape(t.shape[-3:])
    pixels = t * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return to_pil_image(pixels.clamp(0, 1))


def alpha_blend(pil: Image.Image, rgb_array: np.ndarray, alpha: float = 0.5) -> Image.Image:
    """Lay colours, uint8 [H, W, 3], over an RGB image of their size with an opacity `alpha` in [0, 1]."""
    layer = Image.fromarray(rgb_array).convert("RGBA")
    layer.putalpha(round(255 * alpha))
    return Image.alpha_composite(pil.convert("RGBA"), layer).convert("RGB")


def _check_map(values: np.ndarray, name: str) -> None:
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name}: expected a map [height, width], not an array {list(values.shape)}")


def _robust_limits(known: np.ndarray) -> tuple[float, float]:
    if not known.size:
        return 0.0, 1.0
    # Of a large map a part is enough.
    low, high = (float(value) for value in np.percentile(known[:: 1 + known.size // 1_000_000], (1, 99)))
    # A flat map has a colour too: that of the middle.
    return (low, high) if high - low > 1e-6 * high else (0.9 * low, 1.1 * high)


def _percent(share: float) -> str:
    text = f"{100 * share:.0f} %" if share >= 0.005 else "<1 %"
    return text.rjust(5, "\N{FIGURE SPACE}")  # as wide as a digit


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 3].rstrip() + "..."


def _layout(shape: tuple[int, ...]) -> tuple[int, int, int]:
    # Height, width and size of the text. A whole factor, so that pixels stay what they are.
    factor = max(1, math.ceil(MIN_SIDE / max(shape)))
    height, width = factor * shape[0], factor * shape[1]
    return height, width, max(MIN_TEXT, round(TEXT_SHARE * math.sqrt(height * width)))


def _new_figure(width: float, height: float) -> Figure:
    # Not one of pyplot's, which stay alive until they are closed and may need the main thread.
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI)


def _add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    # In pixels from the upper left corner.
    _, _, whole_width, whole_height = figure.bbox.bounds
    place = (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
    return figure.add_axes(place, xticks=[], yticks=[], frame_on=False)


def _render(figure: Figure, margin: int) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    box = figure.get_tightbbox().padded(margin / DPI)  # in inches; how wide the text is is known only now
    right, bottom = math.ceil(box.x1 * DPI), math.ceil(picture.height - box.y0 * DPI)
    return picture.crop((0, 0, min(right, picture.width), min(bottom, picture.height)))
