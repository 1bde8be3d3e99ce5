"""Evaluation of depth models on whole images, and saved predictions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.eval.command.progress import track
from dinov3.eval.dense.pictures import alpha_blend, depth_tensor_to_colorized_pil, normalized_tensor_to_pil
from dinov3.eval.depth.config import DepthConfig, ResultConfig
from dinov3.eval.depth.metrics import (
    DEPTH_METRICS,
    DepthMetric,
    EvalCropType,
    align_depth_least_square,
    calculate_depth_metrics,
    make_valid_mask,
)
from dinov3.eval.depth.transforms import LeftRightFlipAug
from dinov3.eval.features.extraction import make_enumerated_loader
from dinov3.layers.resizing import resize_bilinear
from dinov3.utils.messages import list_names
from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

logger = logging.getLogger("dinov3")

#: By metric: the mean over images, or the values by image.
Results = dict[str, Any]


@torch.no_grad()
def evaluate_depther_with_dataloader(
    dataloader: Iterable[Any],
    depther: nn.Module,
    device: torch.device | str,
    metrics: Sequence[DepthMetric],
    eval_range: Sequence[float],
    result_config: ResultConfig,
    save_dir: str = "",
    ignored_value: float = 0.0,
    eval_mask_type: EvalCropType | str = "NYU_EIGEN",
    reduce_results: bool = True,
    align_least_squares: bool = False,
    use_tta: bool = False,
    *,
    unpad_predictions: bool = False,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> tuple[Results, dict[str, Any], list[int]]:
    """Compute metrics of a depth model, one image after another.

    Args:
        dataloader: yields `(images, (index, depths))`: lists of [1, 3, H, W] and of [1, 1, h, w], the flipped ones
            second with `use_tta`; those with a negative index, which pad a process's share, are predicted and dropped.
        depther: gives depth [B, 1, H', W'] in metres.
        device: of the model.
        metrics: of `DEPTH_METRICS`.
        eval_range: smallest and largest depth that count, metres; predictions are clamped to it.
        result_config: whether and how predictions are saved.
        save_dir: directory for saved predictions.
        ignored_value: depth of pixels without measurement.
        eval_mask_type: which pixels count.
        reduce_results: return means over the images instead of lists.
        align_least_squares: fit scale and shift of each prediction first.
        use_tta: average the predictions of the image and of the flipped image.
        unpad_predictions: call `depther.predict`, which cuts off what padding added, instead of the model itself.
        mean: of the normalisation of images, for saved pictures.
        std: of the normalisation of images, for saved pictures.

    Returns:
        By metric the mean over images that have valid pixels, or the values by image (NaN for those that have none); an
        empty dictionary; the images' indices in the dataset. Nothing depends on the number of processes.

    Raises:
        ValueError: no image has a valid pixel.
    """
    depther.eval()
    flip = LeftRightFlipAug(use_tta)
    low, high = eval_range
    names = [metric.name for metric in metrics]
    rows: dict[int, list[float] | None] = {}
    for images, (index, depths) in track(dataloader, "evaluation", unit="image"):
        batch = torch.cat(list(images)).to(device, non_blocking=True)
        prediction = depther.predict(batch) if unpad_predictions else depther(batch)  # type: ignore[operator]
        if int(index) < 0:  # only predicted because a sharded model needs equally many calls in all processes
            continue
        prediction = flip.inverse(prediction)
        depth = depths[0].to(device, non_blocking=True)
        depth = depth.masked_fill((depth >= high) | (depth <= low), ignored_value)
        valid = make_valid_mask(depth, eval_mask_type, ignored_value)
        prediction = resize_bilinear(prediction, depth.shape[-2:])
        has_valid_pixels = bool(valid.any())
        if align_least_squares and has_valid_pixels:
            prediction, _, _ = align_depth_least_square(depth, prediction, valid)
        if result_config.save_results:
            save_predictions(images[0], prediction, depth, result_config, save_dir, int(index), mean=mean, std=std)
        prediction = prediction.clamp(low, high)
        rows[int(index)] = None
        if has_valid_pixels:
            values = calculate_depth_metrics(depth, prediction, valid, list_metrics=names)
            rows[int(index)] = [float(getattr(values, name)) for name in names]
    return _collect(rows, names, reduce_results=reduce_results)


def evaluate_depther_with_config(
    config: DepthConfig,
    depther: nn.Module,
    device: torch.device | str,
    reduce_results: bool = True,
    *,
    dataset: Any,
    split: str = "test",
    save_dir: str = "",
) -> tuple[Results, dict[str, Any], list[int]]:
    """Call `evaluate_depther_with_dataloader` as `config` describes, with metrics in the order of `DEPTH_METRICS`.

    Args:
        config: of the run.
        depther: gives depth [B, 1, H', W'] in metres.
        device: of the model.
        reduce_results: return means over the images instead of lists.
        dataset: of the split, with its transforms.
        split: `test`, or `val`, which is never flipped and of which nothing is saved.
        save_dir: directory for saved predictions.
    """
    is_test = split == "test"
    return evaluate_depther_with_dataloader(
        make_enumerated_loader(dataset, batch_size=1, num_workers=config.num_workers),
        depther,
        device,
        [metric for metric in DEPTH_METRICS if metric.name in config.metrics],
        (config.eval.min_depth, config.eval.max_depth),
        config.result_config if is_test else ResultConfig(),
        save_dir=save_dir,
        ignored_value=config.eval.ignored_value,
        eval_mask_type=config.transforms.eval.eval_mask,
        reduce_results=reduce_results,
        align_least_squares=config.eval.align_least_squares,
        use_tta=is_test and config.eval.use_tta,
        unpad_predictions=config.eval.unpad_predictions,
        mean=config.transforms.mean,
        std=config.transforms.std,
    )


def save_predictions(
    img: Tensor,
    pred: Tensor,
    gt: Tensor,
    result_config: ResultConfig,
    save_dir: str | Path,
    save_index: int,
    pred_tensor_to_pil_fn: Callable[[Tensor], Image.Image] = depth_tensor_to_colorized_pil,
    *,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> None:
    """Write `results_<index>` into `<save_dir>/visualizations`.

    With the extension "pth" that is a dictionary of the tensors `image`, `pred` and `target`, otherwise a picture of
    the prediction beside the measurement, each coloured by its own range.

    Args:
        img: what the model saw, [1, 3, H, W] or [3, H, W], normalised with `mean` and `std`.
        pred: prediction of one image.
        gt: measurement of one image; its size is that of the pictures.
        result_config: what to write.
        save_dir: the directory of the results.
        save_index: number of the image.
        pred_tensor_to_pil_fn: colours prediction and measurement.
        mean: per channel, of values in [0, 1].
        std: per channel.
    """
    folder = Path(save_dir) / "visualizations"
    folder.mkdir(parents=True, exist_ok=True)
    extension = result_config.extension.value
    if extension == "pth":
        tensors = {"image": img, "pred": pred, "target": gt}
        # Clones, because a view would be written with the whole batch that it is part of.
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        torch.save(tensors, folder / f"results_{save_index}.pth")
        return
    size = gt.shape[-1], gt.shape[-2]
    if result_config.save_resolution:
        scale = result_config.save_resolution / min(size)
        size = max(1, round(scale * size[0])), max(1, round(scale * size[1]))
    pictures = {"image": normalized_tensor_to_pil(img, mean, std).resize(size, Image.Resampling.BILINEAR)}
    for name, depth in (("pred", pred), ("gt", gt)):
        pictures[name] = pred_tensor_to_pil_fn(depth).resize(size, Image.Resampling.NEAREST)
        if result_config.overlay_alpha < 1:
            pictures[name] = alpha_blend(pictures["image"], np.asarray(pictures[name]), result_config.overlay_alpha)
    both = np.concatenate([np.asarray(pictures["pred"]), np.asarray(pictures["gt"])], axis=1)
    Image.fromarray(both).save(folder / f"results_{save_index}.{extension}")
    if result_config.save_separate_files:
        for name, picture in pictures.items():
            picture.save(folder / f"{name}_{save_index}.{extension}")


def mean_of_finite(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _collect(
    own_rows: dict[int, list[float] | None], names: Sequence[str], *, reduce_results: bool
) -> tuple[Results, dict[str, Any], list[int]]:
    # A row is None if the depth map has no pixel that counts.
    gathered = {index: row for part in distributed.all_gather_objects(own_rows) for index, row in part.items()}
    rows = {index: gathered[index] for index in sorted(gathered)}
    without = [index for index, row in rows.items() if row is None]
    broken = [index for index, row in rows.items() if row is not None and any(map(math.isnan, row))]
    if len(without) == len(rows):
        raise ValueError(
            f"none of {len(rows)} depth maps has a pixel that counts: check eval.min_depth and eval.max_depth, "
            "transforms.normalization_constant (stored depth of one metre) and transforms.eval.eval_mask"
        )
    if without:
        logger.warning(
            "%d depth maps have no pixel that counts, so the means leave them out: images %s",
            len(without),
            list_names(without),
        )
    if broken:
        logger.warning(
            "predictions of %d images are not finite, so the means leave out metrics of them that are NaN: images %s",
            len(broken),
            list_names(broken),
        )
    columns: Results = {
        name: [math.nan if row is None else row[column] for row in rows.values()] for column, name in enumerate(names)
    }
    if reduce_results:
        columns = {name: mean_of_finite(values) for name, values in columns.items()}
    return columns, {}, list(rows)
