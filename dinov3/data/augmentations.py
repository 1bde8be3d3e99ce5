"""The multi-crop augmentation of pretraining: two global views of an image, and several small local ones.

Notable:
- Views are uint8 tensors from the first resize to the last distortion, made only by torch: no conversion to Pillow and
  back, and no reference cycles, so that nothing piles up in workers whose garbage collector is off.
- Every random number comes from torch's global generator: `torch.manual_seed` fixes all views of an image.
- An image smaller than a crop is enlarged, like any other cut that has fewer pixels than the crop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinov3.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

logger = logging.getLogger("dinov3")

ASPECT_RATIO = (3 / 4, 4 / 3)
FLIP_PROBABILITY = 0.5

JITTER_PROBABILITY = 0.8
BRIGHTNESS = 0.4  # factors are drawn from 1 - this to 1 + this
CONTRAST = 0.4
SATURATION = 0.2
HUE = 0.1  # in turns of the colour circle, either way
GRAYSCALE_PROBABILITY = 0.2

#: Of global crop 1 (never blurred), global crop 2 and the local crops. The release states 1.0, 0.1, 0.5 but applies a
#: blur with one minus the stated probability; the published weights were trained with what it does.
BLUR_PROBABILITIES = (0.0, 0.9, 0.5)
BLUR_KERNEL_SIZE = 9  # pixels
BLUR_SIGMA = (0.1, 2.0)
SOLARIZE_PROBABILITIES = (0.0, 0.2)  # of global crops 1 and 2

CROP_ATTEMPTS = 10
MIN_CROP_SIZE = BLUR_KERNEL_SIZE // 2 + 1  # pixels; the blur reflects half a kernel at the borders
LUMA = torch.tensor([0.299, 0.587, 0.114])
SMALLEST_STD = 1e-6
CHANNEL_HUES = torch.tensor([0.0, 2.0, 4.0]).view(3, 1, 1)  # in sixths of a turn
# A tap below this changes no pixel by more than 0.03 levels.
NEGLIGIBLE_TAP = 1e-4


class DataAugmentationDINO:
    """Makes two global views, n local views and optionally two views for the Gram teacher of one image.

    Each view is cut at random, resized with antialiasing, mirrored, and distorted: colour jitter, grayscale, blur and,
    in the second global view, solarisation.

    The Gram teacher sees the cuts of the global views at `gram_teacher_crops_size`. Cuts are then made at the larger of
    the two sizes. With distortions, a view is distorted at that size, normalised, and resized as floats to the smaller
    one; without, it is resized first, so that the blur is as strong as in a global crop.

    Args:
        global_crops_scale: smallest and largest share of the image's area that a global crop shows, 0 < a <= b <= 1.
        local_crops_scale: the same for a local crop.
        local_crops_number: n, local views per image.
        global_crops_size: side of a global view in pixels, at least 5.
        local_crops_size: side of a local view, at least 5.
        gram_teacher_crops_size: side of a view for the Gram teacher. Default: no such views.
        gram_teacher_no_distortions: the Gram teacher sees cuts without colour changes, blur and solarisation.
        teacher_no_color_jitter: `global_crops_teacher` are cuts without any distortion.
        local_crops_subset_of_global_crops: cut local views from the cuts of the global ones, at offsets that are
            multiples of `patch_size`, instead of from the image; `local_crops_scale` then has no effect.
        patch_size: used only by `local_crops_subset_of_global_crops`; crop sizes must then be multiples of it.
        share_color_jitter: one jitter for the whole image instead of one per view.
        horizontal_flips: mirror half of the cuts.
        mean: per channel, for pixels in [0, 1].
        std: per channel, > 0.
        blur_probabilities: of global view 1, global view 2 and the local views, in [0, 1].
        output_uint8: return views as uint8, a quarter of the bytes to move, and leave normalising to
            `collate_data_and_cast(normalize=...)`. Views that were resized as floats stay normalised float32.

    Raises:
        TypeError: a size or number is not an integer.
        ValueError: a parameter is out of range.
    """

    def __init__(
        self,
        global_crops_scale: Sequence[float],
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        gram_teacher_crops_size: int | None = None,
        gram_teacher_no_distortions: bool = False,
        teacher_no_color_jitter: bool = False,
        local_crops_subset_of_global_crops: bool = False,
        patch_size: int = 16,
        share_color_jitter: bool = False,
        horizontal_flips: bool = True,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        *,
        blur_probabilities: Sequence[float] = BLUR_PROBABILITIES,
        output_uint8: bool = False,
    ) -> None:
        self.global_crops_scale = _check_scale("global_crops_scale", global_crops_scale)
        self.local_crops_scale = _check_scale("local_crops_scale", local_crops_scale)
        self.local_crops_number = _check_int("local_crops_number", local_crops_number, minimum=0)
        self.global_crops_size = _check_int("global_crops_size", global_crops_size, minimum=MIN_CROP_SIZE)
        self.local_crops_size = _check_int("local_crops_size", local_crops_size, minimum=MIN_CROP_SIZE)
        self.gram_teacher_crops_size = gram_teacher_crops_size
        if gram_teacher_crops_size is not None:
            _check_int("gram_teacher_crops_size", gram_teacher_crops_size, minimum=MIN_CROP_SIZE)
        self.gram_teacher_no_distortions = gram_teacher_no_distortions
        self.teacher_no_color_jitter = teacher_no_color_jitter
        self.local_crops_subset_of_global_crops = local_crops_subset_of_global_crops
        self.patch_size = _check_int("patch_size", patch_size, minimum=1)
        self.share_color_jitter = share_color_jitter
        self.horizontal_flips = horizontal_flips
        self.mean = _check_numbers("mean", mean, count=3)
        self.std = _check_numbers("std", std, count=3, minimum=SMALLEST_STD)
        self.blur_probabilities = _check_numbers(
            "blur_probabilities", blur_probabilities, count=3, minimum=0, maximum=1
        )
        self.output_uint8 = output_uint8
        if local_crops_subset_of_global_crops:
            self._check_local_crops_fit()
        logger.info("%s", self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in vars(self).items())})"

    def __call__(self, image: Image.Image | np.ndarray[Any, Any]) -> dict[str, Any]:
        """Draw the views of an image.

        Args:
            image: of mode RGB, or uint8 [H, W, 3], and any size; a cut smaller than its view is enlarged.

        Returns:
            `global_crops`: 2 tensors [3, G, G]. `global_crops_teacher`: 2 of the same shape, the same objects unless
            `teacher_no_color_jitter`. `gram_teacher_crops`, only with a size for them: 2 tensors [3, size, size].
            `local_crops`: n tensors [3, L, L]. `offsets`: row and column of each local view in its global cut, `()` if
            they are not cut from these. `weak_flag`: True. Views are normalised float32, or see `output_uint8`.

        Raises:
            TypeError: not a PIL image of mode RGB or such an array.
        """
        # [3, H, W], with the channels last in memory: the layout for which torch has a vectorised resize of uint8.
        pixels = torch.from_numpy(_rgb_array(image)).permute(2, 0, 1)
        if self.share_color_jitter:
            pixels = _distort(pixels, jitter=True).unsqueeze(0).contiguous(memory_format=torch.channels_last)[0]
        cut_size = max(self.global_crops_size, self.gram_teacher_crops_size or 0)
        cuts = [self._cut(pixels, cut_size, self.global_crops_scale) for _ in SOLARIZE_PROBABILITIES]

        views: dict[str, Any] = {"weak_flag": True} | self._global_views(cuts)
        if self.teacher_no_color_jitter:
            size = self.global_crops_size
            views["global_crops_teacher"] = [self._finish(_resize(cut, size), size) for cut in cuts]
        if self.local_crops_subset_of_global_crops:
            return views | self._local_views_of(cuts)
        local_cuts = (
            self._cut(pixels, self.local_crops_size, self.local_crops_scale) for _ in range(self.local_crops_number)
        )
        views["local_crops"] = [self._finish(self._distort_local(cut), self.local_crops_size) for cut in local_cuts]
        return views | {"offsets": ()}

    def _global_views(self, cuts: list[Tensor]) -> dict[str, list[Tensor]]:
        size, gram_size = self.global_crops_size, self.gram_teacher_crops_size
        undistorted_gram = gram_size is not None and self.gram_teacher_no_distortions
        sources = [_resize(cut, size) for cut in cuts] if undistorted_gram else cuts
        distorted = [
            _distort(source, jitter=not self.share_color_jitter, blur=blur, solarize=solarize)
            for source, blur, solarize in zip(sources, self.blur_probabilities, SOLARIZE_PROBABILITIES, strict=False)
        ]
        global_crops = [self._finish(view, size) for view in distorted]
        views = {"global_crops": global_crops, "global_crops_teacher": list(global_crops)}
        if gram_size is not None:
            gram_sources = [_resize(cut, gram_size) for cut in cuts] if undistorted_gram else distorted
            views["gram_teacher_crops"] = [self._finish(source, gram_size) for source in gram_sources]
        return views

    def _local_views_of(self, cuts: list[Tensor]) -> dict[str, Any]:
        size = self.local_crops_size
        sources = [_resize(cut, self.global_crops_size) for cut in cuts]
        # The first cut gets the extra view of an odd number.
        from_first = -(-self.local_crops_number // len(sources))
        positions = (self.global_crops_size - size) // self.patch_size + 1
        offsets, views = [], []
        for index in range(self.local_crops_number):
            view = self._distort_local(sources[index // from_first])
            top, left = (self.patch_size * int(draw * positions) for draw in _uniforms(2))
            offsets.append((top, left))
            # A clone: a slice would drag the memory of the whole cut through the queues of the loader.
            views.append(self._finish(view[:, top : top + size, left : left + size].clone(), size))
        return {"local_crops": views, "offsets": offsets}

    def _distort_local(self, cut: Tensor) -> Tensor:
        return _distort(cut, jitter=not self.share_color_jitter, blur=self.blur_probabilities[2])

    def _cut(self, pixels: Tensor, size: int, scale: tuple[float, float]) -> Tensor:
        top, left, height, width = _random_box(pixels.shape[1], pixels.shape[2], scale)
        cut = _resize(pixels[:, top : top + height, left : left + width], size)
        return cut.flip(-1) if self.horizontal_flips and _happens(FLIP_PROBABILITY) else cut

    def _finish(self, view: Tensor, size: int) -> Tensor:
        resize_needed = view.shape[-1] != size
        if self.output_uint8 and not resize_needed:
            return view
        mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (self.mean, self.std))
        normalized = view.float().div_(255).sub_(mean).div_(std)
        # Floats, because bicubic values beyond the range of the pixels are kept.
        return _resize(normalized, size) if resize_needed else normalized

    def _check_local_crops_fit(self) -> None:
        sizes = {name: getattr(self, name) for name in ("global_crops_size", "local_crops_size")}
        if self.local_crops_size > self.global_crops_size:
            raise ValueError(
                f"local crops cannot be cut out of smaller global crops: local_crops_size={self.local_crops_size} > "
                f"global_crops_size={self.global_crops_size}; swap them or unset local_crops_subset_of_global_crops"
            )
        for name, size in sizes.items():
            if size % self.patch_size:
                raise ValueError(
                    f"{name}={size} is not a multiple of patch_size={self.patch_size}, as cutting local crops on the "
                    f"patch grid needs; the next smaller multiple is {size // self.patch_size * self.patch_size}"
                )


def _rgb_array(image: Any) -> np.ndarray[Any, Any]:
    if isinstance(image, Image.Image) and image.mode == "RGB":
        return np.array(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    got = f"mode {image.mode!r}" if isinstance(image, Image.Image) else type(image).__name__
    if isinstance(image, np.ndarray):
        got = f"an array of {image.dtype} {list(image.shape)}"
    raise TypeError(
        f"the augmentation takes a PIL image of mode RGB or an array of uint8 [height, width, 3], got {got}; "
        "dinov3.data.images.to_rgb converts PIL images of other modes"
    )


def _random_box(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    log_ratios = math.log(ASPECT_RATIO[0]), math.log(ASPECT_RATIO[1])
    for _ in range(CROP_ATTEMPTS):
        area_draw, ratio_draw, top_draw, left_draw = _uniforms(4)
        area = height * width * _between(*scale, area_draw)
        ratio = math.exp(_between(*log_ratios, ratio_draw))
        box_height, box_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            return (
                int(top_draw * (height - box_height + 1)),
                int(left_draw * (width - box_width + 1)),
                box_height,
                box_width,
            )
    return _central_box(height, width)


def _central_box(height: int, width: int) -> tuple[int, int, int, int]:
    # The largest centred box of an allowed aspect ratio, as torchvision falls back to.
    box_height = min(height, round(width / ASPECT_RATIO[0]))
    box_width = min(width, round(height * ASPECT_RATIO[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _resize(view: Tensor, size: int) -> Tensor:
    if view.shape[1:] == (size, size):
        return view.contiguous()
    return F.interpolate(view.unsqueeze(0), size=(size, size), mode="bicubic", antialias=True)[0].contiguous()


def _distort(view: Tensor, *, jitter: bool, blur: float = 0.0, solarize: float = 0.0) -> Tensor:
    """Distort uint8 [3, H, W]; returns the same object if nothing happens to it."""
    adjust = jitter and _happens(JITTER_PROBABILITY)
    to_gray = jitter and _happens(GRAYSCALE_PROBABILITY)
    taps = _gaussian_taps(_between(*BLUR_SIGMA, _uniforms(1)[0])) if blur and _happens(blur) else []
    if adjust or to_gray or len(taps) > 1:
        # In float32 and in place, rounded once at the end.
        levels = view.to(torch.float32, memory_format=torch.contiguous_format)
        if adjust:
            levels = _jitter_color(levels)
        if to_gray:
            levels = _luma(levels).expand_as(levels)
        if len(taps) > 1:
            levels = _blur(levels, taps)
        # By way of int16: the direct cast from float to uint8 is not vectorised.
        view = levels.round().to(torch.int16).to(torch.uint8)
    if solarize and _happens(solarize):
        # Inverts the levels from 128 on: these are the ones whose inverse is smaller.
        view = torch.minimum(view, 255 - view)
    return view


def _jitter_color(levels: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of float32 levels in [0, 255], in random order and in place."""
    draws = _uniforms(4)
    ranges = ((1 - BRIGHTNESS, 1 + BRIGHTNESS), (1 - CONTRAST, 1 + CONTRAST), (1 - SATURATION, 1 + SATURATION))
    brightness, contrast, saturation = (_between(*r, draw) for r, draw in zip(ranges, draws, strict=False))
    for step in torch.randperm(4).tolist():
        if step == 0:
            levels.mul_(brightness).clamp_(0, 255)
        elif step == 1:
            gray = float(levels.mean((1, 2)) @ LUMA)
            levels.mul_(contrast).add_((1 - contrast) * gray).clamp_(0, 255)
        elif step == 2:
            gray_levels = _luma(levels)
            levels.mul_(saturation).add_(gray_levels, alpha=1 - saturation).clamp_(0, 255)
        else:
            levels = _rotate_hue(levels, _between(-HUE, HUE, draws[3]))
    return levels


def _luma(levels: Tensor) -> Tensor:
    return (LUMA @ levels.reshape(3, -1)).view(levels.shape[1:])  # [H, W]


def _rotate_hue(levels: Tensor, turns: float) -> Tensor:
    """Rotate the hue of [3, H, W] by up to 1/6 turn; value and chroma (largest minus smallest channel) stay."""
    red, green, blue = levels
    # Sort the channels while keeping track of the hue, in sixths of a turn from red: first green and blue, then the
    # larger of these and red. Comparisons write 0.0 and 1.0 in place, which is vectorised; torch.where is not.
    larger, smaller = torch.maximum(green, blue), torch.minimum(green, blue)
    below = torch.empty_like(red)
    hue = torch.lt(green, blue, out=below).mul(-6.0)
    largest, middle = torch.maximum(red, larger), torch.minimum(red, larger)
    hue.addcmul_(torch.lt(red, larger, out=below), hue.mul(-2).sub_(2))
    chroma = torch.minimum(middle, smaller).neg_().add_(largest)
    middle.sub_(smaller).div_(chroma.add(1e-6))
    hue = hue.add_(middle).abs_().add_(6 * turns)
    # A channel's share of the chroma is 1 within a sixth of a turn of its hue, falls over the next sixth, then is 0.
    distance = hue - CHANNEL_HUES
    share = distance.abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
    return share.sub_(1).mul_(chroma).add_(largest)


def _gaussian_taps(sigma: float) -> list[float]:
    """Return the blur's weights by distance, from 0 on; they sum to 1 over both sides."""
    weights = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(BLUR_KERNEL_SIZE // 2 + 1)]
    total = 2 * sum(weights) - weights[0]
    weights = [weight for weight in weights if weight > NEGLIGIBLE_TAP * total]
    total = 2 * sum(weights) - weights[0]
    return [weight / total for weight in weights]


def _blur(levels: Tensor, taps: list[float]) -> Tensor:
    reach = len(taps) - 1
    _, height, width = levels.shape
    padded = F.pad(levels.unsqueeze(0), (reach,) * 4, mode="reflect")[0]
    rows = padded[:, reach : reach + height] * taps[0]
    for distance in range(1, reach + 1):
        above, below = (padded[:, start : start + height] for start in (reach - distance, reach + distance))
        rows.add_(above + below, alpha=taps[distance])
    blurred = rows[:, :, reach : reach + width] * taps[0]
    for distance in range(1, reach + 1):
        left, right = (rows[:, :, start : start + width] for start in (reach - distance, reach + distance))
        blurred.add_(left + right, alpha=taps[distance])
    return blurred


def _uniforms(count: int) -> list[float]:
    return torch.rand(count, dtype=torch.float64).tolist()


def _happens(probability: float) -> bool:
    return _uniforms(1)[0] < probability


def _between(low: float, high: float, draw: float) -> float:
    return low + (high - low) * draw


def _check_scale(name: str, scale: Sequence[float]) -> tuple[float, float]:
    low, high = values = _check_numbers(name, scale, count=2)
    if not 0 < low <= high <= 1:
        raise ValueError(f"{name} is the smallest and the largest share of the area, 0 < a <= b <= 1; got {values}")
    return low, high


def _check_int(name: str, value: int, *, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def _check_numbers(
    name: str, values: Sequence[float], *, count: int, minimum: float = -math.inf, maximum: float = math.inf
) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be {count} numbers, got {values!r}")
    if not all(minimum <= number <= maximum for number in numbers):
        raise ValueError(f"{name} must be {count} numbers from {minimum:g} to {maximum:g}, got {numbers}")
    return numbers
