"""Evaluation of segmentation models: windows over every image, softmax, mean over sizes and flips, areas of classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.data.datasets.object_maps import classes_of
from dinov3.eval.command.progress import track
from dinov3.eval.dense.pictures import segmentation_picture
from dinov3.eval.features.extraction import make_enumerated_loader
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.data import class_names_of
from dinov3.eval.segmentation.inference import make_inference
from dinov3.eval.segmentation.metrics import (
    IGNORE_INDEX,
    SEGMENTATION_METRICS,
    calculate_intersect_and_union,
    calculate_segmentation_metrics,
    total_area_to_metrics,
)
from dinov3.eval.segmentation.objects import evaluate_objects
from dinov3.utils.messages import list_names

ALL_METRICS = ["mIoU", "dice", "fscore"]
N_DECIMALS = 2


def evaluate_segmentation_model(
    segmentation_model: Any,
    test_dataloader: Iterable[Any],
    device: torch.device | str,
    eval_res: int,
    eval_stride: int,
    decoder_head_type: str,
    num_classes: int,
    autocast_dtype: torch.dtype,
    *,
    inference_mode: str = "slide",
    reduce_zero_label: bool = True,
    metric_per_image: bool = False,
    max_windows_per_batch: int | None = None,
    class_names: Sequence[str] | None = None,
    save_dir: str | Path | None = None,
    has_objects: bool = False,
) -> dict[str, float]:
    """Compute metrics of a model, one image after another.

    Args:
        segmentation_model: has `predict` as `make_inference` needs it, or an attribute `module` that has. A torch
            module is put into evaluation mode.
        test_dataloader: see `count_areas`.
        device: of the model.
        eval_res: side of the square windows, pixels.
        eval_stride: pixels between windows.
        decoder_head_type: `linear` or `m2f`.
        num_classes: K.
        autocast_dtype: of the images.
        inference_mode: `slide`, or `whole`: images resized to `eval_res` x `eval_res`.
        reduce_zero_label: label 0 is ignored, and label k means class k - 1.
        metric_per_image: means over the metrics of images instead of the metrics of all areas.
        max_windows_per_batch: see `slide_inference`.
        class_names: for the table of classes in the log.
        save_dir: directory for predicted maps. Default: none are saved.
        has_objects: labels are object maps, of which the classes count; pixels in no object are ignored.

    Returns:
        The metrics of `SEGMENTATION_METRICS` in percent, with two decimals; they do not depend on the number of
        processes.

    Raises:
        ValueError: no pixel of any image has a label that counts, or a label is not a class.
    """
    model = getattr(segmentation_model, "module", segmentation_model)
    if isinstance(model, nn.Module):
        model.eval()
    infer = functools.partial(
        make_inference,
        inference_mode=inference_mode,
        decoder_head_type=decoder_head_type,
        crop_size=(eval_res, eval_res),
        stride=(eval_stride, eval_stride),
        output_activation=functools.partial(torch.softmax, dim=1),
        whole_size=(eval_res, eval_res),
        max_windows_per_batch=max_windows_per_batch,
    )
    areas = count_areas(
        model,
        test_dataloader,
        device,
        num_classes,
        autocast_dtype,
        infer=infer,
        reduce_zero_label=reduce_zero_label,
        class_names=class_names,
        save_dir=save_dir,
        has_objects=has_objects,
    )
    return summarise_areas(areas, metric_per_image=metric_per_image, class_names=class_names)


@torch.no_grad()
def count_areas(
    model: Any,
    test_dataloader: Iterable[Any],
    device: torch.device | str,
    num_classes: int,
    autocast_dtype: torch.dtype,
    *,
    infer: Callable[..., Tensor],
    reduce_zero_label: bool = True,
    class_names: Sequence[str] | None = None,
    save_dir: str | Path | None = None,
    has_objects: bool = False,
) -> list[Tensor]:
    """Predict one image after another, and count the pixels of each class; every process must call it.

    Args:
        model: has `predict` as `make_inference` needs it, in evaluation mode.
        test_dataloader: yields `(images, (index, label [1, 1, h, w]))`: a list of [1, 3, H, W], whose second half is
            the first one flipped; items with a negative index, which pad a process's share, are predicted and dropped.
        device: of the model.
        num_classes: K.
        autocast_dtype: of the images.
        infer: `make_inference` with its settings, except for those that depend on the image.
        reduce_zero_label: label 0 is ignored, and label k means class k - 1.
        class_names: for pictures.
        save_dir: directory for predicted maps. Default: none are saved.
        has_objects: labels are object maps, of which the classes count; pixels in no object are ignored.

    Returns:
        Areas [4, K] of all images, in the order of the data set; see `calculate_intersect_and_union`.

    Raises:
        ValueError: a label is not a class.
    """
    rows: dict[int, Tensor] = {}
    for images, (index, label) in track(test_dataloader, "evaluation", unit="image"):
        label = classes_of(label) if has_objects else label
        _require_known_labels(label, int(index), num_classes, counts_from=1 if reduce_zero_label else 0)
        probabilities = torch.zeros(())
        for number, image in enumerate(images):
            probabilities = probabilities.to(device) + infer(
                image.to(device, autocast_dtype, non_blocking=True),
                model,
                rescale_to=label.shape[-2:],
                n_output_channels=num_classes,
                apply_horizontal_flip=number >= (len(images) + 1) // 2,
            )
        if int(index) < 0:
            continue
        prediction = probabilities.argmax(dim=1)  # [1, h, w]; sums have the same argmax as means
        areas = calculate_intersect_and_union(
            prediction, label[0].to(device), num_classes, reduce_zero_label=reduce_zero_label
        )
        rows[int(index)] = areas.cpu()
        if save_dir is not None:
            _save_prediction(prediction[0], Path(save_dir), int(index), num_classes, class_names, reduce_zero_label)
    gathered = {index: areas for part in distributed.all_gather_objects(rows) for index, areas in part.items()}
    return [gathered[index] for index in sorted(gathered)]


def evaluate_segmentation_with_config(
    config: SegmentationConfig,
    segmentation_model: Any,
    device: torch.device | str,
    *,
    dataset: Any,
    save_dir: str | Path | None = None,
) -> dict[str, float]:
    """Call `evaluate_segmentation_model`, and `evaluate_objects` for the tasks that need it, as `config` describes.

    Args:
        config: of the run.
        segmentation_model: has `predict` as `make_inference` needs it.
        device: of the model.
        dataset: the validation images with their transforms, which decide on sizes and flips.
        save_dir: directory for predicted maps. Default: none are saved.
    """
    metrics = evaluate_segmentation_model(
        segmentation_model,
        make_enumerated_loader(dataset, batch_size=1, num_workers=config.num_workers),
        device,
        config.eval.crop_size,
        config.eval.stride,
        config.decoder_head.type,
        config.decoder_head.num_classes,
        config.model_dtype.autocast_dtype,
        inference_mode=config.eval.mode,
        reduce_zero_label=config.eval.reduce_zero_label,
        metric_per_image=config.eval.compute_metric_per_image,
        max_windows_per_batch=config.eval.max_windows_per_batch,
        class_names=class_names_of(dataset),
        save_dir=save_dir,
        has_objects=getattr(dataset, "has_objects", False),
    )
    if len(config.eval.tasks) > 1:
        metrics |= evaluate_objects(config, segmentation_model, device, dataset=dataset, save_dir=save_dir)
    return metrics


def _require_known_labels(label: Tensor, index: int, num_classes: int, *, counts_from: int) -> None:
    ids = label.long()
    last = num_classes - 1 + counts_from
    unknown = ids[((ids < 0) | (ids > last)) & (ids != IGNORE_INDEX)].unique().tolist()
    if unknown and index >= 0:
        raise ValueError(
            f"image {index} of the dataset, from 0, has labels {list_names(unknown)}: for {num_classes} classes "
            f"expected {counts_from} to {last}, or {'0 or ' if counts_from else ''}{IGNORE_INDEX} where a pixel is "
            "ignored: correct its label map, or the number of classes"
        )


def summarise_areas(
    areas: Sequence[Tensor], *, metric_per_image: bool = False, class_names: Sequence[str] | None = None
) -> dict[str, float]:
    """Compute metrics from the areas of images.

    Args:
        areas: of each image, [4, K], as `count_areas` gives them.
        metric_per_image: means over the metrics of images instead of the metrics of all areas.
        class_names: for the table of classes in the log.

    Returns:
        The metrics of `SEGMENTATION_METRICS` in percent, with two decimals.

    Raises:
        ValueError: no pixel of any image has a label that counts.
    """
    labelled = [one for one in areas if int(one[3].sum())]
    if not labelled:
        raise ValueError(
            f"none of {len(areas)} images has a labelled pixel that counts: check the labels (255 is ignored, 0 "
            "too with eval.reduce_zero_label=true) and the number of classes"
        )
    if metric_per_image:
        by_image = [total_area_to_metrics(one[0], one[1], one[2], one[3], ALL_METRICS) for one in labelled]
        means = {name: [float(one[name].nanmean()) for one in by_image] for name in SEGMENTATION_METRICS}
        metrics = {name: float(np.nanmean(values)) for name, values in means.items()}
    else:
        metrics = calculate_segmentation_metrics(areas, metrics=ALL_METRICS, class_names=class_names)
    return {name: round(100 * float(metrics[name]), N_DECIMALS) for name in SEGMENTATION_METRICS}


def _save_prediction(
    prediction: Tensor,
    directory: Path,
    index: int,
    num_classes: int,
    class_names: Sequence[str] | None,
    reduce_zero_label: bool,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    labels = prediction.cpu().numpy()
    names = class_names or [f"class {number}" for number in range(num_classes)]
    segmentation_picture(labels, class_names=names).save(directory / f"{index:06d}_picture.png")
    mask = labels + 1 if reduce_zero_label else labels  # as in the dataset
    Image.fromarray(mask.astype(np.uint8 if num_classes < 256 else np.uint16)).save(directory / f"{index:06d}.png")
