"""Pictures of predictions: a map of depths with its scale, and a map of classes over the photo with its legend.

Notable:
- A picture is as large as the map, plus what explains it; small maps are enlarged, so that the text can be read.
- Colours of classes are the same whatever the number of classes is. The first ones are those of Okabe and Ito, which
  colour-blind people tell apart; each further one is as far as possible from all before it, as the eye sees it.
- Pillow draws; matplotlib gives the colormaps and is imported when a depth is drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 320  # pixels of the longer side of a map; smaller ones are enlarged
MIN_TEXT = 13  # pixels
TEXT_SHARE = 0.03  # height of text over the geometric mean of the sides of a map
WIDE = 1.6  # width over height from which on things stand below one another
MAX_LEGEND_ROWS = 5  # below a wide picture

PAPER = (255, 255, 255)
INK = (30, 30, 30)
FAINT_INK = (110, 110, 110)
UNKNOWN = (128, 128, 128)

_OKABE_ITO = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
)


def depth_picture(
    depth: np.ndarray,
    *,
    image: Image.Image | None = None,
    unit: str = "m",
    colormap: str = "plasma",
    limits: tuple[float, float] | None = None,
) -> Image.Image:
    """A map of depths in colours, beside it the photo and a bar that says which colour means what.

    Args:
        depth: [H, W], in `unit`. What is not positive or not finite is unknown and gray.
        image: the photo, resized to the map; None: the map alone.
        unit: stands behind the numbers of the bar.
        colormap: name of one of matplotlib's.
        limits: depths of the first and the last colour; those beyond have the same. None: the 1st and the 99th
            percentile of the map.

    Returns:
        RGB; the photo stands left of the map, or above it if the map is wide.

    Raises:
        ValueError: the map is not [H, W], the limits do not rise, or matplotlib has no such colormap.
    """
    depth = _enlarge(_require_map(depth, "depth")).astype(np.float32)
    is_known = np.isfinite(depth) & (depth > 0)
    low, high = _robust_limits(depth[is_known]) if limits is None else _check_limits(limits)
    palette = _palette(colormap)  # [256, 3]
    with np.errstate(invalid="ignore"):
        steps = ((depth - low) * (256 / (high - low))).clip(0, 255)
    colours = palette[np.where(is_known, steps, 0).astype(np.uint8)]  # [H, W, 3]
    colours[~is_known] = UNKNOWN

    panels = [] if image is None else [_photo(image, depth.shape)]
    panels.append(Image.fromarray(colours))
    text = _text_size(panels[0])
    bar = _draw_bar(panels[-1].height, palette, (low, high) if is_known.any() else None, unit, text)
    return _arrange(panels, bar, text)


def segmentation_picture(
    labels: np.ndarray,
    *,
    class_names: Sequence[str],
    image: Image.Image | None = None,
    overlay_alpha: float = 0.6,
) -> Image.Image:
    """A map of classes in colours over the photo, with a legend of the classes that occur.

    Args:
        labels: integers [H, W], indices of `class_names`; others, e.g. 255, are no class and leave the photo as it is.
        class_names: by class index.
        image: the photo, resized to the map; None: the colours alone.
        overlay_alpha: 0 shows the photo, 1 the colours.

    Returns:
        RGB; the legend has the classes of the largest areas first, and stands right of the map, or below it if the map
        is wide. Classes for which there is no room are counted.

    Raises:
        ValueError: the map is not [H, W] of integers, or `overlay_alpha` is not in 0..1.
    """
    labels = _require_map(labels, "labels")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels: expected integers, class indices, not {labels.dtype}")
    if not 0 <= overlay_alpha <= 1:
        raise ValueError(f"overlay_alpha={overlay_alpha}: expected 0 (the photo) to 1 (the colours)")
    labels, n_classes = _enlarge(labels).astype(np.int64), len(class_names)
    has_class = (labels >= 0) & (labels < n_classes)
    colours = class_colors(n_classes)
    areas = np.bincount(labels[has_class].ravel(), minlength=n_classes)

    under = Image.new("RGB", labels.shape[::-1], UNKNOWN) if image is None else _photo(image, labels.shape)
    # The row behind the last class is of what has no class, and masked out.
    palette = np.vstack([colours, np.array([UNKNOWN], np.uint8)])
    over = Image.fromarray(palette[np.where(has_class, labels, n_classes)])
    blended = Image.blend(under, over, 1.0 if image is None else overlay_alpha)
    panel = Image.composite(blended, under, Image.fromarray(has_class))

    order = [int(index) for index in np.argsort(-areas, kind="stable") if areas[index]]
    entries = [_Entry(class_names[i], areas[i] / labels.size, tuple(colours[i].tolist())) for i in order]
    return _with_legend(panel, entries)


def class_colors(n: int) -> np.ndarray:
    """Colours for classes, always the same; those of fewer classes are the first of those of more.

    Args:
        n: how many; they begin again after 256.

    Returns:
        RGB, uint8 [n, 3].
    """
    colours = _distinct_colours()
    return colours[np.arange(n) % len(colours)]


@lru_cache(maxsize=1)
def _distinct_colours() -> np.ndarray:
    # 256 of them: each next one is the candidate whose nearest colour so far is the farthest.
    levels = np.linspace(0, 255, 12).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    # Neither paper nor ink, nor the gray of what is unknown.
    lab = _lab(candidates)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    candidates, lab = (values[(lab[:, 0] > 25) & (lab[:, 0] < 92) & (chroma > 18)] for values in (candidates, lab))
    chosen = [np.array(colour, dtype=np.float64) for colour in _OKABE_ITO]
    nearest = np.min([np.linalg.norm(lab - _lab(colour), axis=1) for colour in chosen], axis=0)
    while len(chosen) < 256:
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


def _require_map(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name}: expected a map [height, width], not an array {list(values.shape)}")
    return values


def _check_limits(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"limits={limits}: expected two numbers, the first one smaller than the second")
    return float(low), float(high)


def _robust_limits(known: np.ndarray) -> tuple[float, float]:
    if not known.size:
        return 0.0, 1.0
    # Of a large map a part is enough.
    low, high = (float(value) for value in np.percentile(known[:: 1 + known.size // 1_000_000], (1, 99)))
    # A flat map has a colour too: that of the middle.
    return (low, high) if high - low > 1e-6 * high else (0.9 * low, 1.1 * high)


def _palette(colormap: str) -> np.ndarray:
    import matplotlib

    if colormap not in matplotlib.colormaps:
        raise ValueError(f"colormap={colormap!r}: matplotlib has no such colormap; it has e.g. plasma, viridis, magma")
    return (matplotlib.colormaps[colormap](np.arange(256) / 255)[:, :3] * 255).round().astype(np.uint8)


def _photo(image: Image.Image, shape: tuple[int, ...]) -> Image.Image:
    size = (shape[1], shape[0])
    return image.convert("RGB") if image.size == size else image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _enlarge(values: np.ndarray) -> np.ndarray:
    # By a whole factor, so that pixels stay what they are.
    factor = math.ceil(MIN_SIDE / max(values.shape))
    return values.repeat(factor, axis=0).repeat(factor, axis=1) if factor > 1 else values


def _text_size(panel: Image.Image) -> int:
    return max(MIN_TEXT, round(TEXT_SHARE * math.sqrt(panel.width * panel.height)))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _arrange(panels: Sequence[Image.Image], bar: Image.Image, text: int) -> Image.Image:
    # The bar stands right of the last panel and is as high.
    gap = text // 2
    width, height = panels[0].size
    step_x, step_y = (0, height + gap) if width >= WIDE * height else (width + gap, 0)
    last = len(panels) - 1
    size = (last * step_x + width + gap + bar.width + 2 * gap, last * step_y + height + 2 * gap)
    canvas = Image.new("RGB", size, PAPER)
    for position, panel in enumerate(panels):
        canvas.paste(panel, (gap + position * step_x, gap + position * step_y))
    canvas.paste(bar, (gap + last * step_x + width + gap, gap + last * step_y))
    return canvas


def _draw_bar(
    height: int, palette: np.ndarray, limits: tuple[float, float] | None, unit: str, text: int
) -> Image.Image:
    font = _font(text)
    if limits is None:
        low, high, ticks = 0.0, 1.0, []
    else:
        low, high = limits
        ticks = _ticks(low, high, max_count=max(2, int(height / (2.5 * text))))
    labels = [f"{tick} {unit}" for tick in ticks]
    bar_width, tick_width = round(1.2 * text), text // 3
    label_width = max((math.ceil(font.getlength(label)) for label in labels), default=0)
    canvas = Image.new("RGB", (bar_width + 2 * tick_width + label_width, height), PAPER)
    if limits is not None:
        ramp = np.repeat(palette[np.linspace(255, 0, height).round().astype(int)][:, None], bar_width, axis=1)
        canvas.paste(Image.fromarray(ramp), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for tick, label in zip(ticks, labels, strict=True):
        y = (height - 1) * (high - float(tick)) / (high - low)
        draw.line((bar_width, y, bar_width + tick_width, y), fill=INK, width=max(1, text // 12))
        centre = min(max(y, text / 2), height - text / 2)
        draw.text((bar_width + 2 * tick_width, centre), label, fill=INK, font=font, anchor="lm")
    return canvas


def _ticks(low: float, high: float, max_count: int) -> list[str]:
    # Multiples of 1, 2 or 5 times a power of ten, as many as there is room for, but not more than seven.
    max_count = min(max_count, 7)
    for exponent in itertools.count(math.floor(math.log10(high - low)) - 1):
        for factor in (1, 2, 5):
            step = factor * 10.0**exponent
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            if last - first + 1 <= max_count:
                return [f"{number * step:.{max(0, -exponent)}f}" for number in range(first, last + 1)]
    raise AssertionError("unreachable: steps grow until they fit")


@dataclass(frozen=True)
class _Entry:
    name: str
    share: float  # of the map
    colour: tuple[int, ...]

    @property
    def percent(self) -> str:
        return f"{100 * self.share:.0f} %" if self.share >= 0.005 else "< 1 %"


def _with_legend(panel: Image.Image, entries: Sequence[_Entry]) -> Image.Image:
    # Each entry is a swatch, its share, and its name.
    text = _text_size(panel)
    font, gap, line = _font(text), text // 2, round(1.5 * text)
    is_below = panel.width >= WIDE * panel.height
    share_right = line + max((math.ceil(font.getlength(entry.percent)) for entry in entries), default=0)
    most = panel.width - share_right - gap if is_below else max(panel.width // 2, 10 * text)
    names = [_shorten(entry.name, font, most) for entry in entries]
    column = share_right + max((math.ceil(font.getlength(name)) for name in names), default=0) + 3 * gap
    n_columns = max(1, (panel.width + 2 * gap) // column) if is_below else 1
    room = MAX_LEGEND_ROWS * n_columns if is_below else max(2, panel.height // line)
    n_shown = len(names) if len(names) <= room else room - 1
    n_cells = n_shown + (n_shown < len(names))
    n_rows = -(-n_cells // n_columns)

    left, top = (gap, panel.height + 2 * gap) if is_below else (panel.width + 2 * gap, gap)
    size = (panel.width + 2 * gap + (0 if is_below else column), panel.height + 2 * gap + is_below * n_rows * line)
    canvas = Image.new("RGB", size, PAPER)
    canvas.paste(panel, (gap, gap))
    draw = ImageDraw.Draw(canvas)
    for cell in range(n_cells):
        # Column by column: what is large stands on the left.
        x, y = left + (cell // n_rows) * column, top + (cell % n_rows) * line
        if cell == n_shown:
            draw.text((x + line, y + text / 2), f"+{len(names) - n_shown} more", fill=INK, font=font, anchor="lm")
            continue
        draw.rectangle((x, y, x + text, y + text), fill=entries[cell].colour, outline=INK)
        draw.text((x + share_right, y + text / 2), entries[cell].percent, fill=FAINT_INK, font=font, anchor="rm")
        draw.text((x + share_right + gap, y + text / 2), names[cell], fill=INK, font=font, anchor="lm")
    return canvas


def _shorten(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, most: float) -> str:
    shown = name
    while len(name) > 1 and font.getlength(shown) > most:
        name = name[:-1]
        shown = name.rstrip() + "..."
    return shown
