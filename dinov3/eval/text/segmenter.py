"""Segmentation by words: the cosine of each patch with each class (dino.txt, arXiv 2412.16334, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.heads.dinotxt.model import DINOTxt
from dinov3.layers.resizing import resize_bilinear
from dinov3.utils.messages import check_choice

PATCH_TOKENS = ("head", "backbone")


class OpenVocabularySegmenter:
    """A model for `eval.segmentation.inference.make_inference` whose classes are vectors of texts.

    Args:
        model: in evaluation mode.
        class_features: [C, D], of length 1, as `encode_classes` gives them for `patch_channels(model)`.
        patch_tokens: which tokens are compared: `head`, those that texts were aligned with, or `backbone`, those before
            the vision head.
    """

    def __init__(self, model: DINOTxt, class_features: Tensor, patch_tokens: str = "head") -> None:
        self.model = model
        self.class_features = class_features
        self.patch_tokens = check_choice("patch_tokens", patch_tokens, PATCH_TOKENS)

    @torch.no_grad()
    def cosines(self, images: Tensor) -> Tensor:
        """Compare patches with classes.

        Args:
            images: [B, 3, H, W], floating point, normalised. Sides that are not multiples of the patch size are
                stretched to the next.

        Returns:
            [B, C, h, w].
        """
        patch_size = self.model.visual_model.backbone.patch_size
        height, width = (-(-side // patch_size) for side in images.shape[-2:])
        size = (height * patch_size, width * patch_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        _, of_head, of_backbone = self.model.visual_model.get_class_and_patch_tokens(images)
        patch_tokens = F.normalize((of_head if self.patch_tokens == "head" else of_backbone).float(), dim=-1)
        # Classes differ by less than half precision can tell.
        with torch.autocast(images.device.type, enabled=False):
            cosines = patch_tokens @ self.class_features.mT  # [B, P, C]
        return cosines.mT.unflatten(2, (height, width))

    def predict(self, images: Tensor, rescale_to: Sequence[int]) -> Tensor:
        """Return the share of each class in each pixel, [B, C, *rescale_to]: a plain softmax of the cosines."""
        return resize_bilinear(self.cosines(images), rescale_to).softmax(dim=1)


def patch_channels(model: DINOTxt) -> slice:
    """Return the channels of a text's vector that are aligned with patch tokens: the second half.

    Raises:
        ValueError: patch tokens are not part of the model's images, or not beside the class token.
    """
    config = model.model_config
    if not config.vision_model_use_patch_tokens:
        raise ValueError("this model does not use patch tokens, so that no part of its texts is aligned with patches")
    return slice(config.embed_dim // 2 if config.vision_model_use_class_token else 0, None)
