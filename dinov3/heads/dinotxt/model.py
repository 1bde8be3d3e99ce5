"""dino.txt: an image tower and a text tower that meet in one space (arXiv 2412.16334; 2508.10104, section 7.3).

Notable: an image's vector is [class token; mean of the patch tokens]. The first half of a text's vector is therefore
aligned with class tokens, the second half with patch tokens, which makes open-vocabulary segmentation possible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.heads.dinotxt.text_tower import TextTower
from dinov3.heads.dinotxt.text_transformer import TextTransformer
from dinov3.heads.dinotxt.vision_tower import VisionTower

INIT_LOGIT_SCALE = math.log(1 / 0.07)


@dataclass
class DINOTxtConfig:
    """The sizes and options of a model, named as in the published recipes.

    Attributes:
        embed_dim: E, width of the shared space.
        vision_backbone_config: YAML file of an SSL configuration, which builds the backbone where none is given.
        text_backbone_config: YAML file of the arguments of `TextTransformer`, the same.
        vision_backbone_pretrained_weights: what the trainer loads into the vision backbone.
        text_backbone_pretrained_weights: what the trainer loads into the text transformer.
        vision_model_train_img_size: side of the crops of the transforms, pixels; the model takes any size.
        text_vocab_path_or_url: vocabulary of the tokenizer. Default: the published one.
        init_logit_scale: logarithm of the first scale of the logits.
        init_logit_bias: accepted, as published, and not used.

    The others are arguments of `VisionTower` and `TextTower`.
    """

    embed_dim: int
    vision_backbone_config: str | None = None
    text_backbone_config: str | None = None
    vision_backbone_pretrained_weights: str | None = None
    text_backbone_pretrained_weights: str | None = None
    vision_model_freeze_backbone: bool = True
    vision_model_train_img_size: int = 224
    vision_model_use_class_token: bool = True
    vision_model_use_patch_tokens: bool = False
    vision_model_num_head_blocks: int = 0
    vision_model_head_blocks_drop_path: float = 0.3
    vision_model_use_linear_projection: bool = False
    vision_model_patch_tokens_pooler_type: str = "mean"
    vision_model_patch_token_layer: int = 1
    text_model_freeze_backbone: bool = False
    text_model_num_head_blocks: int = 0
    text_model_head_blocks_is_causal: bool = False
    text_model_head_blocks_drop_prob: float = 0.0
    text_model_tokens_pooler_type: str = "first"
    text_model_use_linear_projection: bool = False
    text_vocab_path_or_url: str | None = None
    init_logit_scale: float = INIT_LOGIT_SCALE
    init_logit_bias: float | None = None
    freeze_logit_scale: bool = False


class DINOTxt(nn.Module):
    """Images and texts to vectors whose cosine says how well they fit.

    Args:
        model_config: sizes and options.
        vision_backbone: a ViT.
        text_backbone: the text transformer.
    """

    def __init__(self, model_config: DINOTxtConfig, vision_backbone: nn.Module, text_backbone: TextTransformer) -> None:
        super().__init__()
        self.model_config = config = model_config
        self.visual_model = VisionTower(
            vision_backbone,
            config.vision_model_freeze_backbone,
            config.embed_dim,
            config.vision_model_num_head_blocks,
            config.vision_model_head_blocks_drop_path,
            config.vision_model_use_class_token,
            config.vision_model_use_patch_tokens,
            config.vision_model_patch_token_layer,
            config.vision_model_patch_tokens_pooler_type,
            config.vision_model_use_linear_projection,
        )
        self.text_model = TextTower(
            text_backbone,
            config.text_model_freeze_backbone,
            config.embed_dim,
            config.text_model_num_head_blocks,
            config.text_model_head_blocks_is_causal,
            config.text_model_head_blocks_drop_prob,
            config.text_model_tokens_pooler_type,
            config.text_model_use_linear_projection,
        )
        self.logit_scale = nn.Parameter(
            torch.full([1], config.init_logit_scale), requires_grad=not config.freeze_logit_scale
        )

    def init_weights(self) -> None:
        """Initialise everything, the backbones included."""
        nn.init.constant_(self.logit_scale, self.model_config.init_logit_scale)
        self.visual_model.init_weights()
        self.text_model.init_weights()

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Map normalised images [B, 3, H, W] to vectors [B, E]; `normalize` gives them length 1."""
        return self.encode_image_with_patch_tokens(image, normalize)[0]

    def encode_image_with_patch_tokens(self, image: Tensor, normalize: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same, and also return the patch tokens of head and backbone, which `normalize` does not touch."""
        features, patch_tokens, backbone_patch_tokens = self.visual_model(image)
        return F.normalize(features, dim=-1) if normalize else features, patch_tokens, backbone_patch_tokens

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Map token ids [T, N], int64, to vectors [T, E]; `normalize` gives them length 1."""
        features = self.text_model(text)
        return F.normalize(features, dim=-1) if normalize else features

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of texts for each image [B, T], and of images for each text [T, B]."""
        image_features, text_features, scale, *_ = self(image, text)
        image_logits = scale * image_features @ text_features.mT
        return image_logits, image_logits.mT

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Encode images and texts.

        Args:
            image: [B, 3, H, W], floating point, normalised.
            text: token ids [T, N], int64.

        Returns:
            The vectors of images [B, E] and texts [T, E], of length 1; the scale of the logits [1]; and the patch
            tokens of the vision head [B, P, E or E / 2] and of the backbone [B, P, D], as they are.
        """
        image_features, patch_tokens, backbone_patch_tokens = self.encode_image_with_patch_tokens(image, normalize=True)
        text_features = self.encode_text(text, normalize=True)
        return image_features, text_features, self.logit_scale.exp(), patch_tokens, backbone_patch_tokens
