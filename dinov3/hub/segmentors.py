"""The published segmentor by name: ViT-Adapter and Mask2Former on a frozen backbone (arXiv 2508.10104, section 6.3.2).

    segmentor = dinov3_vit7b16_ms(weights="HEAD.pth", backbone_weights="BACKBONE.pth", device="cuda")
    logits = make_inference(
        images, segmentor, inference_mode="slide", decoder_head_type="m2f", rescale_to=(height, width),
        n_output_channels=150, crop_size=(896, 896), stride=(596, 596),
    )  # make_inference is in dinov3.eval.segmentation.inference

Notable:
- Images are normalised as for ImageNet. Calling the model needs sides that are multiples of 32; `predict` and
  `make_inference` take any.
- The file of the head holds the adapter and the decoder, which the backbone sits between; see
  `heads.weights.set_aside`.
- Of 100 queries each has a class and a mask; `make_inference` sums them to scores of classes.
"""

from __future__ import annotations

from enum import Enum
from functools import partial
from typing import Any

import torch

from dinov3.heads.mask2former.head import Mask2FormerHead
from dinov3.heads.segmentation import FeatureDecoder, build_segmentation_decoder
from dinov3.hub.backbones import Weights, WeightsLike
from dinov3.hub.head_weights import PublishedHead, document_arguments, load_published
from dinov3.hub.sources import Source
from dinov3.utils.messages import did_you_mean

__all__ = ["SegmentorWeights", "dinov3_vit7b16_ms"]


class SegmentorWeights(Enum):
    """The data that published heads were trained on."""

    ADE20K = "ADE20K"


PUBLISHED = PublishedHead(
    entry="dinov3_vit7b16_ms",
    backbone="dinov3_vit7b16",
    weights=SegmentorWeights.ADE20K,
    file="dinov3_vit7b16/dinov3_vit7b16_ade20k_m2f_head",
    file_hash="bf307cb1",
    module="segmentation_model",
)
HEAD_OPTIONS = ("num_classes", "hidden_dim", *(Mask2FormerHead.__init__.__kwdefaults__ or ()))


@document_arguments(
    PUBLISHED,
    arguments="""
        autocast_dtype: what adapter and head compute in, on the device of the images; float32 turns autocast off. The
            pixel decoder always runs in the precision of its weights, and on CUDA the backbone in bfloat16.""",
    keywords=f"; {', '.join(HEAD_OPTIONS)} make another head, see `Mask2FormerHead`",
    returns="`FeatureDecoder` with a frozen backbone and a trainable adapter and head",
)
def dinov3_vit7b16_ms(
    *,
    pretrained: bool = True,
    weights: SegmentorWeights | Source = SegmentorWeights.ADE20K,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.bfloat16,
    **kwargs: Any,
) -> FeatureDecoder:
    """DINOv3 ViT-7B/16 with its Mask2Former head: images to the classes and masks of 100 queries, 150 classes."""
    options = {name: kwargs.pop(name) for name in HEAD_OPTIONS if name in kwargs}
    for name in kwargs:  # the others are checked by the entry of the backbone, which knows nothing of these
        if hint := did_you_mean(name, HEAD_OPTIONS):
            raise TypeError(f"dinov3_vit7b16_ms has no keyword argument {name!r}{hint}")
    return load_published(
        PUBLISHED,
        partial(build_segmentation_decoder, decoder_type="m2f", autocast_dtype=autocast_dtype, **options),
        pretrained=pretrained,
        weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        **kwargs,
    )
