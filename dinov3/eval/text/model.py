"""The model of images and texts of an evaluation."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.distributed import runtime
from dinov3.eval.text.config import TextModelConfig
from dinov3.heads.dinotxt.model import DINOTxt
from dinov3.heads.dinotxt.tokenizer import Tokenizer
from dinov3.heads.dinotxt.vision_tower import VisionTower
from dinov3.hub.dinotxt import dinov3_vitl16_dinotxt_tet1280d20h24l

logger = logging.getLogger("dinov3")


@dataclass(frozen=True)
class TextModel:
    """A model of images and texts, and what an evaluation has to know about it.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: of its texts.
        autocast_dtype: the precision that images run in; float32 means without autocast.
        description: the weights, for reports and results files.
    """

    model: DINOTxt
    tokenizer: Tokenizer
    autocast_dtype: torch.dtype = torch.float32
    description: str = ""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.logit_scale.device

    def autocast(self) -> torch.autocast:
        """Return the context in which images are to be encoded."""
        is_enabled = self.autocast_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=is_enabled)


class ImageEncoder(nn.Module):
    """The image side of a model, whose features [B, E] have length 1."""

    def __init__(self, visual_model: VisionTower) -> None:
        super().__init__()
        self.visual_model = visual_model

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images [B, 3, H, W]."""
        return F.normalize(self.visual_model(images)[0].float(), dim=-1)


def load_text_model(config: TextModelConfig) -> TextModel:
    """Load the model that `config` names, in evaluation mode, on this process's device.

    Raises:
        FileNotFoundError: a file does not exist.
        WeightsError: the weights do not fit.
        ValueError: the vocabulary is not one.
    """
    config.check()
    given: dict[str, Any] = {
        "weights": config.weights,
        "backbone_weights": config.backbone_weights,
        "bpe_path_or_url": config.vocabulary,
    }
    model, tokenizer = dinov3_vitl16_dinotxt_tet1280d20h24l(**{name: path for name, path in given.items() if path})
    description, dtype = config.describe(), config.dtype.autocast_dtype
    logger.info("model: %s, run in %s on %s", description, dtype, runtime.device())
    return TextModel(model.to(runtime.device()).eval(), tokenizer, dtype, description)
