"""Average precision of object masks (COCO's) and panoptic quality (arXiv 1801.00868) of Mask2Former models.

Images are seen as a whole, at the size of `transforms.eval.img_size`. Labels are object maps; pixels that do not count
(crowds, unlabelled ones) are crowds of every class to COCO's metric, and void to the panoptic one.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3 import distributed
from dinov3.data.datasets.object_maps import objects_of, valid_pixels
from dinov3.eval.command.progress import track
from dinov3.eval.features.extraction import make_enumerated_loader
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.data import class_names_of
from dinov3.eval.segmentation.metrics import INSTANCE_METRICS, PANOPTIC_METRICS
from dinov3.heads.mask2former.objects import Instances, Panoptic, instance, panoptic
from dinov3.utils.files import atomic_write

N_DECIMALS = 2
PREDICTIONS_FILENAME, TRUTH_FILENAME = "instances.json", "instances_truth.json"


@torch.no_grad()
def evaluate_objects(
    config: SegmentationConfig,
    model: Any,
    device: torch.device | str,
    *,
    dataset: Any,
    save_dir: str | Path | None = None,
) -> dict[str, float]:
    """Compute the metrics of the tasks `instance` and `panoptic` of `config.eval.tasks`; all processes call it.

    Args:
        config: of the run.
        model: a Mask2Former model.
        device: of the model.
        dataset: the validation images with their transforms; targets are object maps.
        save_dir: gets COCO's results and annotations, and panoptic maps of ids with their segments. Default: nothing is
            written.

    Returns:
        `INSTANCE_METRICS` and `PANOPTIC_METRICS` in percent, with two decimals.
    """
    model.eval()
    tasks, stuff = config.eval.tasks, stuff_indices(config, class_names_of(dataset))
    n_classes = config.decoder_head.num_classes
    found: dict[int, tuple[tuple[int, int], list[dict[str, Any]], list[dict[str, Any]]]] = {}
    quality = _panoptic_quality(n_classes, stuff) if "panoptic" in tasks else None
    loader = make_enumerated_loader(dataset, batch_size=1, num_workers=config.num_workers)
    for images, (index, label) in track(loader, "objects", unit="image"):
        prediction = model.predict(images[0].to(device), rescale_to=label.shape[-2:])
        logits, masks = prediction["pred_logits"][0].float().cpu(), prediction["pred_masks"][0].float().cpu()
        number = int(index)
        if number < 0:  # pads the share of this process
            continue
        if "instance" in tasks:
            truth = coco_truth(label[0, 0], number, n_classes, stuff)
            results = coco_results(instance(logits, masks, stuff=stuff), number)
            found[number] = (label.shape[-2], label.shape[-1]), truth, results
        if quality is not None:
            segments = panoptic(logits, masks, stuff=stuff)
            quality.update(panoptic_pair(segments, n_classes), panoptic_truth(label[0, 0], n_classes))
            if save_dir is not None:
                _save_panoptic(segments, Path(save_dir), number)
    metrics: dict[str, float] = {}
    if "instance" in tasks:
        gathered = {k: v for part in distributed.all_gather_objects(found) for k, v in part.items()}
        sizes = {number: gathered[number][0] for number in sorted(gathered)}
        truths = [one for number in sizes for one in gathered[number][1]]
        results = [one for number in sizes for one in gathered[number][2]]
        content = coco_content(sizes, truths, class_names_of(dataset), n_classes)
        if save_dir is not None and distributed.is_main_process():
            for name, written in ((PREDICTIONS_FILENAME, results), (TRUTH_FILENAME, content)):
                with atomic_write(Path(save_dir) / name, "w") as file:
                    json.dump(written, file)
        metrics |= average_precision(content, results)
    if quality is not None:
        metrics |= _compute_panoptic_quality(quality, n_classes)
    return {name: round(100 * value, N_DECIMALS) for name, value in metrics.items()}


def stuff_indices(config: SegmentationConfig, class_names: Sequence[str] | None) -> set[int]:
    """Return the class indices of `config.eval.stuff`, which holds names or indices.

    Raises:
        ValueError: one is not a class.
    """
    names = list(class_names or [])
    n_classes = config.decoder_head.num_classes
    indices = set()
    for one in config.eval.stuff:
        index = names.index(one) if one in names else int(one) if one.isdecimal() else n_classes
        if index >= n_classes:
            expected = ", ".join(names) or f"0 to {n_classes - 1}"
            raise ValueError(f"eval.stuff: {one!r} is not a class; expected some of {expected}")
        indices.add(index)
    return indices


def coco_results(found: Instances, image_id: int) -> list[dict[str, Any]]:
    """Describe predicted objects as COCO's results do; categories count from 1."""
    return [
        {"image_id": image_id, "category_id": int(label) + 1, "score": float(score), "segmentation": encode(mask)}
        for label, score, mask in zip(found.classes, found.scores, found.masks, strict=True)
    ]


def coco_truth(label: Tensor, image_id: int, n_classes: int, stuff: Collection[int]) -> list[dict[str, Any]]:
    """Describe the objects of an object map [H, W] as COCO's annotations do, ignored pixels as crowds."""
    classes, masks = objects_of(label)
    regions = [(int(k), mask, 0) for k, mask in zip(classes, masks, strict=True)]
    ignored = ~valid_pixels(label)
    if ignored.any():
        regions += [(k, ignored, 1) for k in range(n_classes)]
    return [
        {
            "image_id": image_id,
            "category_id": k + 1,
            "segmentation": encode(mask),
            "area": int(mask.sum()),
            "bbox": box_of(mask),
            "iscrowd": is_crowd,
        }
        for k, mask, is_crowd in regions
        if k not in stuff
    ]


def coco_content(
    sizes: Mapping[int, tuple[int, int]],
    truths: list[dict[str, Any]],
    class_names: Sequence[str] | None,
    n_classes: int,
) -> dict[str, Any]:
    """Put annotations of images of (height, width) `sizes` together to the content of an annotation file."""
    names = list(class_names or [f"class {k}" for k in range(n_classes)])
    return {
        "info": {},
        "images": [{"id": number, "height": height, "width": width} for number, (height, width) in sizes.items()],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(names)],
        "annotations": [{**one, "id": number} for number, one in enumerate(truths, start=1)],
    }


def average_precision(content: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    """Compute COCO's average precision of masks: means over thresholds of the IoU of 0.5 to 0.95, and at 0.5."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not results:
        return dict.fromkeys(INSTANCE_METRICS, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # -1 where there is no object.
    return {name: max(float(value), 0.0) for name, value in zip(INSTANCE_METRICS, evaluation.stats, strict=False)}


def encode(mask: Tensor) -> dict[str, Any]:
    """Encode a mask [H, W] as COCO's run lengths, as JSON can hold them."""
    from pycocotools import mask as coco_masks

    encoded = coco_masks.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def box_of(mask: Tensor) -> list[int]:
    """Return [left, top, width, height] of a mask [H, W] that is not empty, in pixels."""
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    left, top = int(columns.min()), int(rows.min())
    return [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]


def segments_of(found: Panoptic) -> list[dict[str, Any]]:
    """Describe the segments of a panoptic map, by the ids in it; hidden ones are left out."""
    masks = [(number, found.ids == number) for number in range(1, len(found.classes) + 1)]
    return [
        {
            "id": number,
            "class": int(found.classes[number - 1]),
            "score": round(float(found.scores[number - 1]), 4),
            "area": int(mask.sum()),
            "box": box_of(mask),
        }
        for number, mask in masks
        if mask.any()
    ]


def panoptic_pair(found: Panoptic, n_classes: int) -> Tensor:
    """Return [1, H, W, 2] with class and number of the segment of each pixel; in none, class `n_classes`."""
    classes = torch.cat([found.classes.new_tensor([n_classes]), found.classes])[found.ids]
    return torch.stack([classes, found.ids], dim=-1)[None]


def panoptic_truth(label: Tensor, n_classes: int) -> Tensor:
    """Return [1, H, W, 2] of an object map [H, W]: pixels in no object have class `n_classes`, ignored ones -1."""
    classes, masks = objects_of(label)
    pair = torch.stack([torch.full(label.shape, n_classes), torch.zeros(label.shape, dtype=torch.long)], dim=-1)
    pair[~valid_pixels(label)] = -1
    for number, (k, mask) in enumerate(zip(classes.tolist(), masks, strict=True), start=1):
        pair[mask] = torch.tensor([k, number])
    return pair[None]


def _panoptic_quality(n_classes: int, stuff: Collection[int]) -> Any:
    from torchmetrics.detection import PanopticQuality

    # The last one is where nothing is, or is found: to the metric a pixel must have a class, unless it is void.
    return PanopticQuality(
        things=set(range(n_classes)) - set(stuff),
        stuffs={*stuff, n_classes},
        allow_unknown_preds_category=True,
        return_sq_and_rq=True,
        return_per_class=True,
        sync_on_compute=False,
    )


def _compute_panoptic_quality(quality: Any, n_classes: int) -> dict[str, float]:
    for name in ("iou_sum", "true_positives", "false_positives", "false_negatives"):
        setattr(quality, name, distributed.all_reduce(getattr(quality, name)))
    order = sorted(quality.things) + sorted(quality.stuffs)
    counted = quality.true_positives + quality.false_positives + quality.false_negatives > 0
    by_class = quality.compute().reshape(-1, 3)  # PQ, SQ, RQ of each class
    rows = [row for row, k in enumerate(order) if k != n_classes and counted[row]]
    means = by_class[rows].mean(dim=0).tolist() if rows else [0.0] * 3
    return dict(zip(PANOPTIC_METRICS, means, strict=True))


def _save_panoptic(found: Panoptic, directory: Path, index: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    Image.fromarray(found.ids.numpy().astype(np.uint16)).save(directory / f"{index:06d}_panoptic.png")
    with atomic_write(directory / f"{index:06d}_panoptic.json", "w") as file:
        json.dump(segments_of(found), file)
