"""The published model of images and texts by name, with its tokenizer (dino.txt, arXiv 2508.10104, section 7.3).

    model, tokenizer = dinov3_vitl16_dinotxt_tet1280d20h24l(weights="HEAD.pth", backbone_weights="BACKBONE.pth")
    texts = model.encode_text(tokenizer.tokenize(["a photo of a cat", "a photo of a dog"]), normalize=True)
    similarities = model.encode_image(images, normalize=True) @ texts.mT

Notable: the published file holds the vision head and the text tower; the vision backbone has a file of its own.
"""

from __future__ import annotations

import hashlib
import logging
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from dinov3.heads.dinotxt.model import INIT_LOGIT_SCALE, DINOTxt, DINOTxtConfig
from dinov3.heads.dinotxt.text_transformer import TextTransformer
from dinov3.heads.dinotxt.tokenizer import Tokenizer
from dinov3.hub.backbones import Weights, WeightsLike
from dinov3.hub.downloads import download
from dinov3.hub.head_weights import PublishedHead, document_arguments, load_published
from dinov3.hub.sources import BASE_URL, Source, is_download
from dinov3.models.vision_transformer import DinoVisionTransformer

__all__ = ["DINOTxtWeights", "dinov3_vitl16_dinotxt_tet1280d20h24l", "get_tokenizer"]

logger = logging.getLogger("dinov3")

VOCABULARY_URL = f"{BASE_URL}/thirdparty/bpe_simple_vocab_16e6.txt.gz"


class DINOTxtWeights(Enum):
    """The data that published models were trained on."""

    LVTD2300M = "LVTD2300M"


PUBLISHED = PublishedHead(
    entry="dinov3_vitl16_dinotxt_tet1280d20h24l",
    backbone="dinov3_vitl16",
    weights=DINOTxtWeights.LVTD2300M,
    file="dinov3_vitl16/dinov3_vitl16_dinotxt_vision_head_and_text_encoder",
    file_hash="a442d8f5",
    module="",
    defaults={"logit_scale": torch.tensor([INIT_LOGIT_SCALE])},
)
CONFIG = DINOTxtConfig(
    embed_dim=2048,
    vision_model_use_patch_tokens=True,
    vision_model_num_head_blocks=2,
    text_model_tokens_pooler_type="argmax",
    text_model_use_linear_projection=True,
)

TEXT_TRANSFORMER: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": 49408,
    "dim": 1280,
    "num_heads": 20,
    "num_layers": 24,
    "ffn_ratio": 4.0,
    "is_causal": True,
}


@document_arguments(
    PUBLISHED,
    arguments="""
        bpe_path_or_url: vocabulary of the tokenizer. The default is the published one, which the package
            open_clip_torch contains, so that nothing is downloaded.""",
    returns="pair of a `DINOTxt` and its `Tokenizer`",
)
def dinov3_vitl16_dinotxt_tet1280d20h24l(
    *,
    pretrained: bool = True,
    weights: DINOTxtWeights | Source = DINOTxtWeights.LVTD2300M,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    bpe_path_or_url: str = VOCABULARY_URL,
    check_hash: bool = False,
    **kwargs: Any,
) -> tuple[DINOTxt, Tokenizer]:
    """DINOv3 ViT-L/16 with its text encoder: images and texts to vectors of one space."""
    tokenizer = get_tokenizer(bpe_path_or_url)  # before gigabytes are read
    if backbone_weights in (Weights.SAT493M, Weights.SAT493M.name):
        logger.warning("the text encoder belongs to the backbone of LVD1689M: with that of SAT493M, texts do not fit")
    model = load_published(
        PUBLISHED,
        _build,
        pretrained=pretrained,
        weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        **kwargs,
    )
    return model, tokenizer


def get_tokenizer(bpe_path_or_url: str = VOCABULARY_URL) -> Tokenizer:
    """Make a tokenizer from a vocabulary.

    Args:
        bpe_path_or_url: a local file, or a URL, which is downloaded once. For the published one, that of the package
            open_clip_torch is used.

    Raises:
        ModuleNotFoundError: open_clip_torch is missing.
        FileNotFoundError: the file does not exist or cannot be downloaded.
        ValueError: it is not a vocabulary.
    """
    if bpe_path_or_url == VOCABULARY_URL:
        return Tokenizer()
    if not is_download(bpe_path_or_url):
        return Tokenizer(bpe_path_or_url)
    digest = hashlib.sha256(bpe_path_or_url.encode()).hexdigest()[:16]
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"vocabulary_{digest}.txt.gz"

    def check(partial: Path) -> None:
        Tokenizer(partial)

    if not path.exists():
        try:
            download(bpe_path_or_url, path, progress=False, check=check)
        except ConnectionError as error:
            raise FileNotFoundError(f"no vocabulary at {bpe_path_or_url}: {error}") from error
    return Tokenizer(path)


def _build(backbone: DinoVisionTransformer, *, head_device: torch.device) -> DINOTxt:
    with head_device:
        text = TextTransformer(**TEXT_TRANSFORMER)
        model = DINOTxt(CONFIG, backbone, text)
    if head_device.type != "meta":
        torch.nn.init.constant_(model.logit_scale, CONFIG.init_logit_scale)
        model.visual_model.head.init_weights()
        model.text_model.init_weights()
    return model
