"""A small segmentor, structured like the published one."""

from __future__ import annotations

from typing import Any

import torch

from dinov3.heads.segmentation import FeatureDecoder, build_segmentation_decoder
from tests.heads.tiny import randomise_, tiny_backbone

N_CLASSES = 5
HEAD: dict[str, Any] = {
    "num_classes": N_CLASSES,
    "hidden_dim": 32,
    "n_queries": 7,
    "ffn_dim": 24,
    "n_encoder_layers": 1,
    "n_decoder_layers": 3,
}


def small_segmentor(**kwargs: Any) -> FeatureDecoder:
    """A model in evaluation mode, with random weights that let every part show."""
    torch.manual_seed(0)
    model = build_segmentation_decoder(tiny_backbone(), decoder_type="m2f", **{**HEAD, **kwargs})
    randomise_(model)
    return model.eval()
