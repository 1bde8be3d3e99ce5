"""Pictures of depth maps, and predictions written to disk.

Matplotlib is imported when a map is coloured, so that evaluation without pictures does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

BILINEAR, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST


class _Extension(Protocol):
    @property
    def value(self) -> str: ...


class ResultConfigLike(Protocol):
    """The settings of `save_predictions`.

    Attributes:
        extension: has the `value` "jpg", "png" or "pth".
        save_resolution: shorter side of the pictures in pixels; None: the size of the measurement.
        overlay_alpha: weight of the coloured map over the image, in [0, 1].
        save_separate_files: write image, prediction and measurement into files of their own as well.
    """

    save_resolution: int | None
    overlay_alpha: float
    save_separate_files: bool

    @property
    def extension(self) -> _Extension: ...


def depth_tensor_to_colorized_pil(
    depth: Tensor, cmap: str = "plasma", vmin: float | None = None, vmax: float | None = None
) -> Image.Image:
    """A depth map in the colours of a Matplotlib colour map.

    Args:
        depth: [..., H, W], of one image.
        cmap: name of the colour map.
        vmin: depth of its first colour; None: the smallest depth.
        vmax: depth of its last colour; None: the largest depth. Equal to `vmin`: all pixels get the first colour.

    Returns:
        An RGB image. NaN and infinite pixels are black.

    Raises:
        ValueError: there is more than one map.
    """
    import matplotlib

    if depth.ndim < 2 or depth.shape[:-2].numel() != 1:
        raise ValueError(f"expected one depth map, [1, 1, H, W], [1, H, W] or [H, W], got shape {tuple(depth.shape)}")
    values = depth.detach().float().cpu().reshape(depth.shape[-2:]).numpy()  # [H, W]
    finite = np.isfinite(values)
    low = values[finite].min(initial=np.inf) if vmin is None else vmin
    high = values[finite].max(initial=-np.inf) if vmax is None else vmax
    with np.errstate(invalid="ignore"):
        shares = (values - low) / (high - low) if low != high else np.zeros_like(values)
    colors = matplotlib.colormaps[cmap](np.ma.array(shares, mask=~finite), bytes=True)[..., :3]  # [H, W, 3]
    return Image.fromarray(np.ascontiguousarray(colors))


def normalized_tensor_to_pil(
    t: Tensor, mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> Image.Image:
    """The picture that a model's input shows.

    Args:
        t: [3, H, W] or [1, 3, H, W], normalised with `mean` and `std`.
        mean: per channel, of values in [0, 1].
        std: per channel.

    Returns:
        An RGB image; values outside [0, 1] are clipped.
    """
    t = t.detach().float().cpu().reshape(t.shape[-3:])
    shape = (3, 1, 1)
    pixels = (t * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1) * 255
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def alpha_blend(pil: Image.Image, rgb_array: np.ndarray, alpha: float = 0.5) -> Image.Image:
    """An image under a layer of colours.

    Args:
        pil: the image.
        rgb_array: uint8 [H, W, 3], of its size.
        alpha: opacity of the colours, in [0, 1].

    Returns:
        An RGB image.
    """
    layer = Image.fromarray(rgb_array).convert("RGBA")
    layer.putalpha(round(255 * alpha))
    return Image.alpha_composite(pil.convert("RGBA"), layer).convert("RGB")


def save_predictions(
    img: Tensor,
    pred: Tensor,
    gt: Tensor,
    result_config: ResultConfigLike,
    save_dir: str | Path,
    save_index: int,
    pred_tensor_to_pil_fn: Callable[[Tensor], Image.Image] = depth_tensor_to_colorized_pil,
    *,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> None:
    """Write `results_<index>` into `<save_dir>/visualizations`.

    With the extension "pth" that is a dict of the tensors `image`, `pred` and `target`, otherwise a picture of the
    prediction beside the measurement, each coloured by its own range.

    Args:
        img: what the model saw, [1, 3, H, W] or [3, H, W], normalised.
        pred: prediction of one image.
        gt: measurement of one image; its size is that of the pictures.
        result_config: what to write.
        save_dir: the folder of results.
        save_index: of the image.
        pred_tensor_to_pil_fn: colours prediction and measurement.
        mean: that the image was normalised with.
        std: that the image was normalised with.
    """
    folder = Path(save_dir) / "visualizations"
    folder.mkdir(parents=True, exist_ok=True)
    extension = result_config.extension.value
    if extension == "pth":
        tensors = {"image": img, "pred": pred, "target": gt}
        # Clones: a view would bring all of the batch that it is part of.
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        torch.save(tensors, folder / f"results_{save_index}.pth")
        return
    image = normalized_tensor_to_pil(img, mean, std)
    maps = {"pred": pred_tensor_to_pil_fn(pred), "gt": pred_tensor_to_pil_fn(gt)}
    pictures = _at_one_size(image, maps, result_config.save_resolution)
    if result_config.overlay_alpha < 1:
        for name in maps:
            pictures[name] = alpha_blend(pictures["image"], np.asarray(pictures[name]), result_config.overlay_alpha)
    _beside(pictures["pred"], pictures["gt"]).save(folder / f"results_{save_index}.{extension}")
    if result_config.save_separate_files:
        for name, picture in pictures.items():
            picture.save(folder / f"{name}_{save_index}.{extension}")


def _at_one_size(
    image: Image.Image, maps: dict[str, Image.Image], save_resolution: int | None
) -> dict[str, Image.Image]:
    width, height = maps["gt"].size
    if save_resolution:
        short = min(width, height)
        width, height = (max(1, round(side * save_resolution / short)) for side in (width, height))
    resized: dict[str, Any] = {"image": image.resize((width, height), BILINEAR)}
    return resized | {name: picture.resize((width, height), NEAREST) for name, picture in maps.items()}


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both
