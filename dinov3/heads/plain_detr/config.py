"""What a Plain-DETR detector is made of, and which combinations exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dinov3.utils.messages import check_choice


class PositionEncoding(Enum):
    """How the positions of cells are encoded for the Transformer."""

    LEARNED = "learned"
    SINE = "sine"
    SINE_UNNORM = "sine_unnorm"


#: Choices that exist in published settings but never worked: the value that works.
ONLY_VALUES = {
    "with_box_refine": True,
    "two_stage": True,
    "decoder_type": "global_rpe_decomp",
    "num_feature_levels": 1,
    "blocks_to_train": None,
}
CHOICES = {"norm_type": ("pre_norm", "post_norm"), "decoder_rpe_type": ("linear", "abs_log8")}
#: Smallest values of whole numbers.
MINIMA = {
    "num_classes": 1,
    "num_queries_one2one": 1,
    "num_queries_one2many": 0,
    "k_one2many": 0,
    "topk": 1,
    "dec_layers": 1,
    "dim_feedforward": 1,
    "hidden_dim": 32,
    "nheads": 1,
    "proposal_feature_levels": 1,
    "proposal_min_size": 1,
    "decoder_rpe_hidden_dim": 1,
    "num_encoder_layers": 1,
    "n_windows_sqrt": 0,
}
#: Groups of the norm after the input projection.
N_GROUPS = 32


@dataclass(kw_only=True)
class DetectionHeadConfig:
    """Settings of a detector, under their published names.

    Attributes:
        num_classes: K, columns of the class logits. COCO's category ids index them directly, hence 91.
        with_box_refine: each layer refines the boxes of the one before. Only True works.
        two_stage: queries start from boxes that the encoder proposes. Only True works.
        mixed_selection: the content of queries is learned, and only their positions come from proposals.
        look_forward_twice: gradients of a layer's boxes also reach the layer before.
        k_one2many: how often each object is repeated for the second group of queries (training).
        lambda_one2many: weight of their losses (training).
        num_queries_one2one: queries that predict, at inference the only ones.
        num_queries_one2many: further queries in training.
        reparam: boxes are pixels, and refined by deltas; otherwise shares of the image, and refined in logits.
        topk: detections of an image.
        position_embedding: a `PositionEncoding` or its value.
        num_feature_levels: of the encoder. Only 1 works.
        dec_layers: L.
        dim_feedforward: hidden width of the feed-forward networks.
        hidden_dim: E, a multiple of 32 and of `nheads`.
        dropout: of the sublayers of encoder and decoder, in training.
        nheads: of all attentions.
        norm_type: of the decoder, "pre_norm" or "post_norm".
        aux_loss: also return what the layers before the last predict.
        proposal_feature_levels: strides at which boxes are proposed.
        proposal_min_size: side of a proposal at the first stride, in pixels; it doubles with each.
        proposal_in_stride: pixels of a cell, the backbone's patch size.
        proposal_tgt_strides: pixels of a cell at each stride of the proposals, each twice the one before.
        decoder_type: only "global_rpe_decomp", attention to all cells with a bias that depends on the box, works.
        decoder_use_checkpoint: compute layers of the decoder again in the backward pass, to save memory.
        decoder_rpe_hidden_dim: hidden width of the networks that make this bias.
        decoder_rpe_type: their input: "linear", pixels, or "abs_log8", logarithms of pixels.
        add_transformer_encoder: False leaves the encoder out.
        num_encoder_layers: number of its layers.
        layers_to_use: indices of the backbone's blocks that are read, or how many of the last.
        blocks_to_train: only None works: the backbone is frozen.
        n_windows_sqrt: the backbone reads so many windows along each side, and the whole image; 0: only the image.
        backbone_use_layernorm: normalise each block that is read once more.

    Raises:
        ValueError: a value that does not exist or never worked, by its name.
    """

    num_classes: int = 91
    with_box_refine: bool = True
    two_stage: bool = True
    mixed_selection: bool = True
    look_forward_twice: bool = True
    k_one2many: int = 6
    lambda_one2many: float = 1.0
    num_queries_one2one: int = 300
    num_queries_one2many: int = 1500
    reparam: bool = True
    topk: int = 100
    position_embedding: PositionEncoding | str = PositionEncoding.SINE
    num_feature_levels: int = 1
    dec_layers: int = 6
    dim_feedforward: int = 2048
    hidden_dim: int = 256
    dropout: float = 0.0
    nheads: int = 8
    norm_type: str = "pre_norm"
    aux_loss: bool = True
    proposal_feature_levels: int = 4
    proposal_min_size: int = 50
    proposal_in_stride: int | None = None
    proposal_tgt_strides: Sequence[int] | None = None
    decoder_type: str = "global_rpe_decomp"
    decoder_use_checkpoint: bool = False
    decoder_rpe_hidden_dim: int = 512
    decoder_rpe_type: str = "linear"
    add_transformer_encoder: bool = True
    num_encoder_layers: int = 6
    layers_to_use: int | Sequence[int] | None = None
    blocks_to_train: Any = None
    n_windows_sqrt: int = 0
    backbone_use_layernorm: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.position_embedding, PositionEncoding):
            known = [member.value for member in PositionEncoding]
            self.position_embedding = PositionEncoding(
                check_choice("position_embedding", self.position_embedding, known)
            )
        for name, only in ONLY_VALUES.items():
            if (value := getattr(self, name)) != only:
                raise ValueError(f"{name}={value!r} is not supported: only {name}={only!r} works")
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name, least in MINIMA.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: expected at least 0 and less than 1")
        for name, divisor in ((f"{N_GROUPS}", N_GROUPS), (f"nheads={self.nheads}", self.nheads)):
            if self.hidden_dim % divisor:
                raise ValueError(f"hidden_dim={self.hidden_dim}: expected a multiple of {name}")

    def check_complete(self) -> None:
        """Raise a ValueError unless strides and layers, which depend on the backbone, are given and fit together."""
        for name in ("proposal_in_stride", "proposal_tgt_strides", "layers_to_use"):
            if getattr(self, name) is None:
                raise ValueError(f"{name}=None: it must be given, because it depends on the backbone")
        strides, start = list(self.proposal_tgt_strides or ()), int(self.proposal_in_stride or 0)
        if len(strides) != self.proposal_feature_levels:
            raise ValueError(
                f"proposal_tgt_strides={strides}: expected as many as proposal_feature_levels="
                f"{self.proposal_feature_levels}"
            )
        possible = {start * 2**k for k in range(-4, 5)} if start > 0 else set()
        if not set(strides) <= possible or any(b != 2 * a for a, b in zip(strides, strides[1:], strict=False)):
            raise ValueError(
                f"proposal_tgt_strides={strides}: expected proposal_in_stride={start} times powers of two, each twice "
                "the one before"
            )
