"""Plain-DETR (arXiv 2308.01904) on a frozen ViT: images to the classes and boxes of queries (arXiv 2508.10104, 6.3.1).

    backbone -> input projection -> encoder -> proposals at four strides -> decoder, which refines the best of them

Notable:
- The best proposals are those with the largest logit of class 0, which is no category of COCO: it is trained to say
  whether there is an object.
- The positions of queries are sines of pixels, although the formula was made for shares of the image: trained weights
  rely on it.
- Training has a second group of queries, several of which are matched to one object (H-DETR, arXiv 2207.13080); the
  groups do not see each other. `switch_to_inference_queries` leaves the first only.
- Heads of classes and boxes are entries of the decoder, too, as in published files: the same parameters, twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from dinov3.heads.plain_detr.backbone import (
    DetectionBackbone,
    ViTReader,
    WindowedReader,
    build_position_encoding,
)
from dinov3.heads.plain_detr.config import N_GROUPS, DetectionHeadConfig
from dinov3.heads.plain_detr.decoder import Decoder, DecoderLayer, in_float32
from dinov3.heads.plain_detr.encoder import Encoder
from dinov3.heads.plain_detr.nested import NestedTensor, nested_tensor_from_tensor_list
from dinov3.heads.plain_detr.proposals import Proposals, build_expansion, make_proposals
from dinov3.layers.boxes import box_xyxy_to_cxcywh, delta2bbox, inverse_sigmoid
from dinov3.layers.embedding import make_embedding
from dinov3.layers.perceptron import Perceptron
from dinov3.layers.position_encodings import sine_encoding

__all__ = ["PlainDetr", "build_model"]

#: Initial probability of each class.
PRIOR = 0.01
INIT_STD = 0.02


def refine_boxes(boxes: Tensor, deltas: Tensor, max_shape: tuple[Tensor, Tensor] | None) -> Tensor:
    """Move boxes [..., 4], (cx, cy, w, h), by deltas.

    Args:
        boxes: pixels, or shares of the image.
        deltas: of pixels see `delta2bbox`; of shares, steps of their logits.
        max_shape: (height, width) of the image that clips pixels; None: boxes are shares.
    """
    if max_shape is None:
        return (deltas.float() + inverse_sigmoid(boxes.float())).sigmoid()
    return box_xyxy_to_cxcywh(delta2bbox(boxes, deltas, max_shape))


class Decoded(NamedTuple):
    """What a Transformer returns.

    Attributes:
        queries: [L, B, Q, E], after each layer.
        boxes: float32 [L, B, Q, 4], that each layer starts from.
        deltas: float32 [L, B, Q, 4], of each layer.
        proposals: boxes of all cells and the valid extent.
        proposal_logits: [B, P, K].
        proposal_deltas: float32 [B, P, 4].
        proposal_boxes: float32 [B, P, 4], refined.
    """

    queries: Tensor
    boxes: Tensor
    deltas: Tensor
    proposals: Proposals
    proposal_logits: Tensor
    proposal_deltas: Tensor
    proposal_boxes: Tensor


class Transformer(nn.Module):
    """Encoder, proposals and decoder.

    Args:
        config: complete, see `DetectionHeadConfig.check_complete`.
    """

    def __init__(self, config: DetectionHeadConfig) -> None:
        super().__init__()
        self.config = config
        dim, n_heads, ffn_dim, dropout = config.hidden_dim, config.nheads, config.dim_feedforward, config.dropout
        #: Q, at most one for each cell.
        self.two_stage_num_proposals = config.num_queries_one2one + config.num_queries_one2many
        self.level_embed = nn.Parameter(torch.empty(1, dim))
        self.encoder = (
            Encoder(config.num_encoder_layers, dim, n_heads, ffn_dim, dropout)
            if config.add_transformer_encoder
            else None
        )
        stride = int(config.proposal_in_stride or 0)
        self.enc_output_proj = (
            build_expansion(dim, stride, config.proposal_tgt_strides or ())
            if config.proposal_feature_levels > 1
            else None
        )
        self.enc_output = nn.Linear(dim, dim)
        self.enc_output_norm = nn.LayerNorm(dim)
        self.pos_trans = nn.Linear(2 * dim, 2 * dim)
        self.pos_trans_norm = nn.LayerNorm(2 * dim)
        attention = {
            "rpe_hidden_dim": config.decoder_rpe_hidden_dim,
            "rpe_type": config.decoder_rpe_type,
            "stride": stride,
        }
        pre_norm = config.norm_type == "pre_norm"
        layer = partial(DecoderLayer, dim, n_heads, ffn_dim, dropout, pre_norm=pre_norm, attention=attention)
        self.decoder = Decoder(
            [layer() for _ in range(config.dec_layers)],
            dim,
            final_norm=pre_norm,
            look_forward_twice=config.look_forward_twice,
            use_checkpoint=config.decoder_use_checkpoint,
        )
        self._initialise()

    def forward(
        self, maps: Tensor, mask: Tensor, pos: Tensor, query_embed: Tensor | None, n_first: int | None
    ) -> Decoded:
        """Detect objects in maps.

        Args:
            maps: [B, E, h, w].
            mask: bool [B, h, w], True in the padding.
            pos: [B, E, h, w], positions of the cells.
            query_embed: [Q, E], contents of queries. Default: made from proposals, as the positions are.
            n_first: queries of the first group, which see only each other, as do the others. Default: all see all.
        """
        memory = maps.flatten(2).transpose(1, 2)  # [B, N, E]
        cell_pos = pos.flatten(2).transpose(1, 2) + self.level_embed
        if self.encoder is not None:
            memory = self.encoder(memory, mask.flatten(1), cell_pos)
        proposals = self.propose(memory, mask)
        logits = self.decoder.class_embed[-1](proposals.memory)
        deltas = in_float32(self.decoder.bbox_embed[-1], proposals.memory)
        if proposals.max_shape is None:
            refined = (deltas + proposals.boxes).sigmoid()
        else:
            refined = refine_boxes(proposals.boxes, deltas, proposals.max_shape)
        # Small images have fewer cells than there are queries.
        best = logits[..., 0].topk(min(self.two_stage_num_proposals, logits.shape[1]), dim=1).indices  # [B, Q]
        boxes = refined.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        embedding = in_float32(nn.Sequential(self.pos_trans, self.pos_trans_norm), self.get_proposal_pos_embed(boxes))
        query_pos, contents = embedding.to(memory.dtype).chunk(2, dim=-1)
        if query_embed is not None:
            contents = query_embed[: best.shape[1]].expand(len(memory), -1, -1)
        queries, after, query_deltas = self.decoder(
            contents,
            query_pos,
            boxes,
            memory,
            cell_pos,
            mask,
            refine=partial(refine_boxes, max_shape=proposals.max_shape),
            scale=None if self.config.reparam else self._pixels(mask),
            seen=None if n_first is None else _seen_within_groups(best.shape[1], n_first, memory.device),
        )
        before = torch.cat([boxes[None], after[:-1]])
        return Decoded(queries, before, query_deltas, proposals, logits, deltas, refined)

    def propose(self, memory: Tensor, mask: Tensor) -> Proposals:
        """Propose a box for each cell at each stride, from memory [B, N, E] with mask [B, h, w]."""
        config = self.config
        grid = memory.transpose(1, 2).unflatten(2, mask.shape[1:])  # [B, E, h, w]
        maps = [grid] if self.enc_output_proj is None else [network(grid) for network in self.enc_output_proj]
        proposals = make_proposals(
            maps,
            mask,
            strides=list(config.proposal_tgt_strides or ()),
            min_size=config.proposal_min_size,
            in_pixels=config.reparam,
        )
        return proposals._replace(memory=self.enc_output_norm(self.enc_output(proposals.memory)))

    def get_proposal_pos_embed(self, boxes: Tensor) -> Tensor:
        """Encode boxes [B, Q, 4], (cx, cy, w, h), as float32 [B, Q, 2 E]."""
        return sine_encoding(boxes.float() * (2 * math.pi), self.config.hidden_dim // 2).flatten(2)

    def _pixels(self, mask: Tensor) -> Tensor:
        # Boxes are shares of the valid extent.
        columns, rows = (~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)
        return (torch.stack([columns, rows, columns, rows], -1) * int(self.config.proposal_in_stride or 0))[:, None]

    def _initialise(self) -> None:
        if self.level_embed.is_meta:
            return
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.level_embed)
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _seen_within_groups(n_queries: int, n_first: int, device: torch.device) -> Tensor:
    first = torch.arange(n_queries, device=device) < n_first
    return first[:, None] == first


class PlainDetr(nn.Module):
    """A detector: a frozen backbone, an input projection, a Transformer, and heads of classes and boxes.

    Args:
        backbone: reads images.
        n_channels: of its map.
        config: complete, see `DetectionHeadConfig.check_complete`.
    """

    # Typed by hand, because PyTorch only knows that a ModuleList holds modules.
    input_proj: Any
    class_embed: Any
    bbox_embed: Any

    def __init__(self, backbone: DetectionBackbone, n_channels: int, config: DetectionHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.num_queries_one2one = config.num_queries_one2one
        self.num_queries = config.num_queries_one2one + config.num_queries_one2many
        dim, n_predictions = config.hidden_dim, config.dec_layers + 1
        self.backbone = backbone
        projection = nn.Sequential(nn.Conv2d(n_channels, dim, 1), nn.GroupNorm(N_GROUPS, dim))
        self.input_proj = nn.ModuleList([projection])
        self.query_embed = make_embedding(self.num_queries, dim) if config.mixed_selection else None
        self.transformer = Transformer(config)
        # The last ones are those of the proposals.
        self.class_embed = nn.ModuleList(nn.Linear(dim, config.num_classes) for _ in range(n_predictions))
        self.bbox_embed = nn.ModuleList(Perceptron(dim, dim, 4, 3) for _ in range(n_predictions))
        self.transformer.decoder.class_embed = self.class_embed
        self.transformer.decoder.bbox_embed = self.bbox_embed
        self._initialise()

    def switch_to_inference_queries(self) -> Self:
        """Leave only the queries of the first group; `query_embed` keeps all of its rows, so that files load."""
        self.num_queries = self.transformer.two_stage_num_proposals = self.num_queries_one2one
        return self

    def forward(self, images: NestedTensor | Sequence[Tensor]) -> dict[str, Any]:
        """Predict classes and boxes.

        Args:
            images: normalised, [3, H, W] each, padded to the largest; or a batch with its mask.

        Returns:
            `pred_logits` [B, Q, K] and `pred_boxes` [B, Q, 4], (cx, cy, w, h) in pixels (shares of the image without
            `reparam`), of the first group of queries; with `reparam` also `pred_boxes_old` and `pred_deltas`, which the
            last layer started from and added. The same of the second group with names that end in `_one2many`.
            `aux_outputs` and `aux_outputs_one2many` list the same for each layer before the last, and `enc_outputs` has
            those of the proposals.
        """
        if not isinstance(images, NestedTensor):
            images = nested_tensor_from_tensor_list(images)
        convolution, norm = self.input_proj[0]
        maps, mask, pos = self.backbone(images, convolution.weight.flatten(1))
        maps = norm(maps + convolution.bias[:, None, None])
        contents = None if self.query_embed is None else self.query_embed.weight[: self.num_queries]
        n_first = self.num_queries_one2one
        decoded = self.transformer(maps, mask, pos, contents, n_first if n_first < self.num_queries else None)
        layers = self._predictions(decoded)
        first, second = ([{k: v[:, part] for k, v in layer.items()} for layer in layers] for part in _halves(n_first))
        outputs: dict[str, Any] = {**first[-1], **{f"{name}_one2many": x for name, x in second[-1].items()}}
        if self.config.aux_loss:
            outputs |= {"aux_outputs": first[:-1], "aux_outputs_one2many": second[:-1]}
        outputs["enc_outputs"] = {"pred_logits": decoded.proposal_logits, "pred_boxes": decoded.proposal_boxes}
        if self.config.reparam:
            outputs["enc_outputs"] |= {
                "pred_boxes_old": decoded.proposals.boxes,
                "pred_deltas": decoded.proposal_deltas,
            }
        return outputs

    def _predictions(self, decoded: Decoded) -> list[dict[str, Tensor]]:
        logits = [head(x) for head, x in zip(self.class_embed, decoded.queries, strict=False)]
        boxes = refine_boxes(decoded.boxes, decoded.deltas, decoded.proposals.max_shape)
        predictions = []
        for i, layer_logits in enumerate(logits):
            prediction = {"pred_logits": layer_logits, "pred_boxes": boxes[i]}
            if self.config.reparam:
                prediction |= {"pred_boxes_old": decoded.boxes[i], "pred_deltas": decoded.deltas[i]}
            predictions.append(prediction)
        return predictions

    def _initialise(self) -> None:
        convolution = self.input_proj[0][0]
        if convolution.weight.is_meta:
            return
        nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(convolution.bias)
        for head in self.class_embed:
            nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
        for perceptron in self.bbox_embed:
            for parameter in perceptron.layers[-1].parameters():
                nn.init.zeros_(parameter)


def _halves(n_first: int) -> tuple[slice, slice]:
    return slice(None, n_first), slice(n_first, None)


def build_model(
    backbone: nn.Module, config: DetectionHeadConfig, *, head_device: torch.device | str | None = None
) -> PlainDetr:
    """Build a detector around a backbone, initialised at random.

    Args:
        backbone: a ViT; put into evaluation mode, its parameters frozen.
        config: with `layers_to_use`, `proposal_in_stride` and `proposal_tgt_strides`.
        head_device: where everything else is built. Default: where the backbone is.

    Raises:
        ValueError: an incomplete configuration, or blocks that the backbone lacks.
    """
    config.check_complete()
    with torch.device(head_device or next(backbone.parameters()).device):
        layers: Any = config.layers_to_use
        reader: Any = ViTReader(backbone, layers, use_layernorm=config.backbone_use_layernorm)
        if config.n_windows_sqrt > 0:
            reader = WindowedReader(reader, config.n_windows_sqrt, int(config.proposal_in_stride or 0))
        encoding = build_position_encoding(config.position_embedding, config.hidden_dim // 2)
        return PlainDetr(DetectionBackbone(reader, encoding), reader.n_channels, config)
