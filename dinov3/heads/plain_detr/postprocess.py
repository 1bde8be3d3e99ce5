"""From a detector's raw outputs to scored boxes, and a detector that takes images of any size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.heads.plain_detr.backbone import padded_side
from dinov3.heads.plain_detr.detr import PlainDetr
from dinov3.heads.plain_detr.nested import nested_tensor_from_tensor_list
from dinov3.layers.boxes import box_cxcywh_to_xyxy

__all__ = ["DetectorWithProcessor", "PostProcess"]

Detections = list[dict[str, Tensor]]


class PostProcess(nn.Module):
    """Choose the best-scored pairs of query and class, without a threshold and without suppressing overlaps.

    Args:
        topk: detections of an image.
        reparam: boxes are pixels of the network's input, otherwise shares of the image.
        allow_fewer: return all pairs if there are fewer than `topk`, as small images have; otherwise that is an error.
    """

    def __init__(self, topk: int = 100, reparam: bool = False, *, allow_fewer: bool = False) -> None:
        super().__init__()
        self.topk = topk
        self.reparam = reparam
        self.allow_fewer = allow_fewer

    @torch.no_grad()
    def forward(
        self, outputs: Mapping[str, Any], target_sizes: Tensor, original_target_sizes: Tensor | None = None
    ) -> Detections:
        """Return the detections of each image.

        Args:
            outputs: `pred_logits` [B, Q, K] and `pred_boxes` [B, Q, 4] of a detector.
            target_sizes: [B, 2], (height, width) of the images in the network's input, without padding.
            original_target_sizes: [B, 2], (height, width) whose pixels the result is in. Default: `target_sizes`, and
                always that without `reparam`, as published: then pass the original sizes as `target_sizes`.

        Returns:
            For each image `scores` [topk], descending, `labels` int64 [topk], and `boxes` [topk, 4], (x1, y1, x2, y2).
        """
        logits, boxes = outputs["pred_logits"].float(), box_cxcywh_to_xyxy(outputs["pred_boxes"].float())
        n_classes, available = logits.shape[2], logits.shape[1] * logits.shape[2]
        if self.topk > available and not self.allow_fewer:
            raise ValueError(
                f"topk={self.topk}: {logits.shape[1]} queries and {n_classes} classes make only {available} detections"
            )
        scores, indices = logits.sigmoid().flatten(1).topk(min(self.topk, available), dim=1)
        chosen = boxes.gather(1, (indices // n_classes)[..., None].expand(-1, -1, 4))
        sizes = _box_scale(target_sizes, chosen)
        if not self.reparam:
            chosen = chosen * sizes
        else:
            chosen = chosen.clamp(min=0).minimum(sizes)
            if original_target_sizes is not None:
                chosen = chosen * (_box_scale(original_target_sizes, chosen) / sizes)
        return [
            {"scores": s, "labels": label, "boxes": b}
            for s, label, b in zip(scores, indices % n_classes, chosen, strict=True)
        ]


def _box_scale(sizes: Tensor, boxes: Tensor) -> Tensor:
    return sizes.to(boxes).flip(-1).repeat(1, 2)[:, None]  # [B, 1, 4], (W, H, W, H)


class DetectorWithProcessor(nn.Module):
    """A detector with its post-processing.

    Args:
        detector: the detector.
        postprocessor: chooses detections.
        any_size: run only images of equal size together, so that the result of one does not depend on the others, and
            pad them with masked zeros so that no pixel is lost: to multiples of the patch, at least one patch for each
            window, and one cell at the coarsest stride of proposals. False pads all images to the largest, as
            published: then rows and columns beyond the last whole patch are lost, and small images are an error.
    """

    def __init__(self, detector: PlainDetr, postprocessor: PostProcess, *, any_size: bool = False) -> None:
        super().__init__()
        self.detector = detector
        self.postprocessor = postprocessor
        self.any_size = any_size

    def forward(self, images: Sequence[Tensor]) -> Detections:
        """Detect objects.

        Args:
            images: each [3, H, W], floating point, normalised as for ImageNet; sizes may differ.

        Returns:
            For each image `scores`, `labels` and `boxes`, see `PostProcess.forward`, in pixels of that image.

        Raises:
            ValueError: an image of another shape or dtype.
        """
        check_images(images)
        if not len(images):
            return []
        if not self.any_size:
            return self._detect(images, None)
        by_size: dict[torch.Size, list[int]] = defaultdict(list)
        for i, image in enumerate(images):
            by_size[image.shape].append(i)
        found: dict[int, dict[str, Tensor]] = {}
        for shape, members in by_size.items():
            canvas = self._canvas(*shape[1:])
            found.update(zip(members, self._detect([images[i] for i in members], canvas), strict=True))
        return [found[i] for i in range(len(images))]

    def _detect(self, images: Sequence[Tensor], canvas: tuple[int, int] | None) -> Detections:
        outputs = self.detector(nested_tensor_from_tensor_list(images, canvas))
        sizes = torch.tensor([image.shape[1:] for image in images], device=images[0].device)
        return self.postprocessor(outputs, sizes)

    def _canvas(self, height: int, width: int) -> tuple[int, int]:
        config = self.detector.config
        stride, strides = config.proposal_in_stride, config.proposal_tgt_strides
        assert stride is not None and strides is not None
        rows, columns = (
            padded_side(side, stride, n_windows=config.n_windows_sqrt, least=max(strides)) for side in (height, width)
        )
        return rows, columns


def check_images(images: Sequence[Tensor]) -> None:
    """Raise a ValueError that names the first of `images` which is not a floating-point [3, H, W]."""
    if isinstance(images, Tensor):
        raise ValueError(f"expected a list of images [3, height, width], got one tensor of shape {list(images.shape)}")
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point() or min(image.shape[1:]) < 1:
            raise ValueError(
                f"image {i} is {image.dtype} of shape {list(image.shape)}: expected a normalised floating-point "
                "[3, height, width]; convert grey or transparent images to RGB"
            )
