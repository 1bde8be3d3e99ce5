"""Intersection over union and related metrics, from areas that are counted per image and summed over a dataset.

What 0/0 means: the class drops out of the mean of that metric. So a class that is neither in the labels nor predicted
drops out of all metrics. If it is predicted but never labelled, its IoU, Dice and precision are 0 and count, its
accuracy and recall drop out; if it is labelled but never predicted, its IoU, Dice, accuracy and recall are 0 and count,
its precision drops out. The F-score drops out in both cases.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from dinov3.utils.messages import did_you_mean

logger = logging.getLogger("dinov3")

IGNORE_INDEX = 255  # label of pixels that do not count
#: Unsigned integers that PyTorch can hardly compute with.
WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)

#: What can be computed, in the order of reports.
SEGMENTATION_METRICS = ["mIoU", "acc", "aAcc", "dice", "fscore", "precision", "recall"]
#: Of object masks and of panoptic maps, see `dinov3.eval.segmentation.objects`.
INSTANCE_METRICS = ["AP", "AP50"]
PANOPTIC_METRICS = ["PQ", "SQ", "RQ"]
METRIC_GROUPS = {"mIoU": ("mIoU", "acc"), "dice": ("dice", "acc"), "fscore": ("fscore", "precision", "recall")}


def preprocess_nonzero_labels(label: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Make class ids count from 0, where label 0 means "unlabelled" and classes count from 1, as in ADE20K.

    Args:
        label: class ids of any shape, of an integer dtype.
        ignore_index: what unlabelled pixels become; pixels that have this value already keep it. It must fit the dtype
            and not be a class id: with 255 there can be at most 255 classes.

    Returns:
        A new tensor of the same dtype: `ignore_index` for 0 and `ignore_index`, otherwise one less.

    Raises:
        TypeError: the dtype is not an integer.
        ValueError: `ignore_index` does not fit the dtype.
    """
    if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        raise TypeError(f"labels are class ids of an integer dtype, got {label.dtype}")
    limits = torch.iinfo(label.dtype)
    if not limits.min <= ignore_index <= limits.max:
        raise ValueError(f"ignore_index={ignore_index} does not fit labels of {label.dtype}")
    ids = label.long() if label.dtype in WIDE_UNSIGNED else label
    ignored = (ids == 0) | (ids == ignore_index)
    return (ids - 1).masked_fill(ignored, ignore_index).to(label.dtype)


def calculate_intersect_and_union(
    pred_label: Tensor,
    label: Tensor,
    num_classes: int,
    ignore_index: int = IGNORE_INDEX,
    reduce_zero_label: bool = False,
) -> Tensor:
    """Count the pixels of each class in an image, over the pixels that are labelled.

    Args:
        pred_label: predicted classes, integers of any shape.
        label: true classes, integers of the same shape.
        num_classes: K. Ids outside 0 to K - 1 do not belong to a class: a pixel with such a prediction counts only for
            its label, and the reverse.
        ignore_index: label of pixels that are left out.
        reduce_zero_label: labels are 1 to K, and 0 is left out; see `preprocess_nonzero_labels`.

    Returns:
        int64 [4, K], in pixels: intersection, union, prediction, label.

    Raises:
        ValueError: the shapes differ.
    """
    if pred_label.shape != label.shape:
        raise ValueError(f"a prediction of shape {list(pred_label.shape)} for labels of shape {list(label.shape)}")
    if reduce_zero_label:
        label = preprocess_nonzero_labels(label, ignore_index)
    # Wide enough for any ignore_index and number of classes.
    pred_label, label = pred_label.long(), label.long()
    labelled = label != ignore_index
    pred_label, label = pred_label[labelled], label[labelled]
    intersection, predicted, true = (
        ids[(ids >= 0) & (ids < num_classes)].bincount(minlength=num_classes)
        for ids in (pred_label[pred_label == label], pred_label, label)
    )
    return torch.stack([intersection, predicted + true - intersection, predicted, true])


def total_area_to_metrics(
    total_area_intersect: Tensor,
    total_area_union: Tensor,
    total_area_pred_label: Tensor,
    total_area_label: Tensor,
    metrics: Sequence[str] = ("mIoU",),
    beta: float = 1,
) -> dict[str, Tensor]:
    """Compute the metrics of each class.

    Args:
        total_area_intersect: [K], pixels where prediction and label are the class.
        total_area_union: [K], pixels where prediction or label is the class.
        total_area_pred_label: [K], pixels that are predicted to be the class.
        total_area_label: [K], pixels that are labelled as the class.
        metrics: `"mIoU"` gives `mIoU` and `acc`; `"dice"` gives `dice` and `acc`; `"fscore"` gives `fscore`,
            `precision` and `recall`.
        beta: weight of recall in the F-score, relative to precision.

    Returns:
        float64 [K] in [0, 1] by name, NaN where it is 0/0, and always `aAcc`: the share of all labelled pixels that are
        predicted correctly, a scalar.

    Raises:
        KeyError: a metric is unknown.
    """
    for name in metrics:
        if name not in METRIC_GROUPS:
            raise KeyError(
                f"unknown metric {name!r}{did_you_mean(str(name), METRIC_GROUPS)}: expected some of "
                f"{', '.join(METRIC_GROUPS)}"
            )
    intersect, union, predicted, true = (
        torch.as_tensor(areas).double()
        for areas in (total_area_intersect, total_area_union, total_area_pred_label, total_area_label)
    )
    precision, recall = intersect / predicted, intersect / true
    values = {
        "mIoU": intersect / union,
        "acc": recall,
        "dice": 2 * intersect / (predicted + true),
        # As published it is NaN also for a class that is labelled and predicted but never at the same pixel: precision
        # and recall are 0, and their harmonic mean is 0/0. So the mean F-score is never below the mean Dice.
        "fscore": (1 + beta**2) * precision * recall / (beta**2 * precision + recall),
        "precision": precision,
        "recall": recall,
    }
    wanted = [name for metric in metrics for name in METRIC_GROUPS[metric]]
    return {"aAcc": intersect.sum() / true.sum()} | {name: values[name] for name in wanted}


def calculate_segmentation_metrics(
    pre_eval_results: Sequence[Tensor] | Tensor,
    metrics: Sequence[str] = ("mIoU",),
    beta: float = 1,
    *,
    class_names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Compute the metrics of a dataset: areas are summed over all images, then metrics are averaged over classes.

    Those of each class are logged.

    Args:
        pre_eval_results: areas [4, K] of each image, from `calculate_intersect_and_union`.
        metrics: see `total_area_to_metrics`.
        beta: see `total_area_to_metrics`.
        class_names: of the K classes, for the table that is logged. Default: their numbers.

    Returns:
        Values in [0, 1] by name, those asked for in the order of `SEGMENTATION_METRICS`. NaN if no class has a value.

    Raises:
        KeyError: a metric is unknown.
        ValueError: there are no images, or the number of names is not that of classes.
    """
    total = sum_areas(pre_eval_results)
    intersect, union, predicted, true = total
    by_class = total_area_to_metrics(intersect, union, predicted, true, metrics, beta)
    names = [str(index) for index in range(total.shape[1])] if class_names is None else list(class_names)
    if len(names) != total.shape[1]:
        raise ValueError(f"{len(names)} class names for areas of {total.shape[1]} classes")
    ordered = {name: by_class[name] for name in SEGMENTATION_METRICS if name in by_class}
    means = {name: float(values.nanmean()) for name, values in ordered.items()}
    logger.info("per class, in percent:\n%s", _table(names, ordered))
    logger.info("over all classes: %s", ", ".join(f"{name} {100 * value:.2f}" for name, value in means.items()))
    return means


def sum_areas(areas: Sequence[Tensor] | Tensor) -> Tensor:
    """Sum the areas [4, K] of images; raises a ValueError if there are none."""
    if len(areas) == 0:
        raise ValueError("no areas to compute metrics of: the dataset has no images")
    stacked = torch.stack([torch.as_tensor(area) for area in areas])  # [N, 4, K]
    # In float32, pixels of a class would be lost above 2^24.
    return stacked.sum(dim=0, dtype=torch.float64 if stacked.is_floating_point() else torch.int64)


def _table(class_names: Sequence[str], metrics: dict[str, Tensor]) -> str:
    columns = {name: values.tolist() for name, values in metrics.items() if values.ndim == 1}
    width = max(len("class"), *map(len, class_names))
    lines = ["  ".join([f"{'class':<{width}}", *(f"{name:>9}" for name in columns)])]
    lines += [
        "  ".join([f"{class_name:<{width}}", *(f"{100 * values[row]:>9.2f}" for values in columns.values())])
        for row, class_name in enumerate(class_names)
    ]
    return "\n".join(lines)
