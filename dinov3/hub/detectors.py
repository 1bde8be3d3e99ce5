"""The published detector by name: Plain-DETR on a frozen backbone (arXiv 2508.10104, section 6.3.1).

    detector = dinov3_vit7b16_de(weights="HEAD.pth", backbone_weights="BACKBONE.pth", topk=100, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        for found in detector([image, another_image]):  # normalised, [3, H, W] each
            print(found["scores"], found["labels"], found["boxes"])

Notable:
- Images are normalised as for ImageNet, and may have any size. Only images of equal size run together, so the
  detections of an image do not depend on the others; the canvas is padded with masked zeros to multiples of the patch,
  to at least 80 pixels a side. Where a side has 48 pixels or less, no proposal is valid, and nothing sensible is found.
- Labels are the category ids of COCO, 1 to 90 with gaps. Nothing is suppressed, and no score is too low.
- The file of the head holds everything but the backbone, which sits inside; see `heads.weights.set_aside`.
"""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import nn

from dinov3.heads.plain_detr.config import DetectionHeadConfig
from dinov3.heads.plain_detr.detr import build_model
from dinov3.heads.plain_detr.postprocess import DetectorWithProcessor, PostProcess
from dinov3.hub.backbones import Weights, WeightsLike
from dinov3.hub.head_weights import PublishedHead, document_arguments, load_published
from dinov3.hub.sources import Source
from dinov3.models.summary import patch_stride
from dinov3.utils.messages import did_you_mean

__all__ = ["DetectionWeights", "DetectorWithProcessor", "build_detector", "dinov3_vit7b16_de"]


class DetectionWeights(Enum):
    """The data that published heads were trained on."""

    COCO2017 = "COCO2017"


PUBLISHED = PublishedHead(
    entry="dinov3_vit7b16_de",
    backbone="dinov3_vit7b16",
    weights=DetectionWeights.COCO2017,
    file="dinov3_vit7b16/dinov3_vit7b16_coco2017_detr_head",
    file_hash="b0235ff7",
    module="detector",
)
HEAD_OPTIONS = tuple(field.name for field in fields(DetectionHeadConfig))
#: Where the published head departs from the defaults of `DetectionHeadConfig`. Windows are those of the ViT-7B.
PUBLISHED_CONFIG: dict[str, Any] = {
    "num_queries_one2one": 1500,
    "num_queries_one2many": 1500,
    "topk": 1500,
    "hidden_dim": 768,
    "n_windows_sqrt": 3,
}


def build_detector(
    backbone: nn.Module, *, head_device: torch.device | str | None = None, **options: Any
) -> DetectorWithProcessor:
    """Build a detector of the published structure around a backbone, initialised at random.

    Args:
        backbone: a ViT; put into evaluation mode, its parameters frozen.
        head_device: where everything else is built. Default: where the backbone is.
        **options: fields of `DetectionHeadConfig`. By default four blocks at even intervals are read, and boxes are
            proposed at half the patch size, the patch size, and two and four times it.

    Raises:
        TypeError: an option that does not exist.
        ValueError: a value that does not exist or never worked, by its name.
    """
    for name in options:
        if name not in HEAD_OPTIONS:
            raise TypeError(f"a detector has no option {name!r}{did_you_mean(name, HEAD_OPTIONS)}")
    stride, n_blocks = patch_stride(backbone), int(backbone.n_blocks)  # type: ignore[arg-type]
    n_levels = options.get("proposal_feature_levels", 4)
    defaults = {
        "proposal_in_stride": stride,
        "proposal_tgt_strides": [stride * 2**level // 2 for level in range(n_levels)],
        "layers_to_use": [m * n_blocks // 4 - 1 for m in (1, 2, 3, 4)],
    }
    config = DetectionHeadConfig(**{**PUBLISHED_CONFIG, **defaults, **options})
    detector = build_model(backbone, config, head_device=head_device).switch_to_inference_queries()
    postprocessor = PostProcess(config.topk, config.reparam, allow_fewer=True)
    return DetectorWithProcessor(detector, postprocessor, any_size=True)


@document_arguments(
    PUBLISHED,
    keywords="; `topk`, the most detections of an image, `num_classes` and the other fields of "
    "`DetectionHeadConfig` make another detector",
    returns="`DetectorWithProcessor` with a frozen backbone, which takes a list of normalised images [3, H, W] of any "
    "sizes and returns for each a dictionary of `scores`, `labels` and `boxes`",
)
def dinov3_vit7b16_de(
    *,
    pretrained: bool = True,
    weights: DetectionWeights | Source = DetectionWeights.COCO2017,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    check_hash: bool = False,
    **kwargs: Any,
) -> DetectorWithProcessor:
    """DINOv3 ViT-7B/16 with its Plain-DETR head: images to scored boxes of COCO's 80 classes."""
    options = {name: kwargs.pop(name) for name in HEAD_OPTIONS if name in kwargs}
    for name in kwargs:  # the others are checked by the entry of the backbone, which knows nothing of these
        if hint := did_you_mean(name, HEAD_OPTIONS):
            raise TypeError(f"dinov3_vit7b16_de has no keyword argument {name!r}{hint}")
    # Values are checked before weights are read.
    DetectionHeadConfig(**{**PUBLISHED_CONFIG, **options})
    return load_published(
        PUBLISHED,
        partial(build_detector, **options),
        pretrained=pretrained,
        weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        **kwargs,
    )
