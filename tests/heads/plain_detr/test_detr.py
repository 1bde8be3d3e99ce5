"""The whole detector: its configuration, its initial values, and what learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dinov3.heads.plain_detr.config import DetectionHeadConfig, PositionEncoding
from dinov3.heads.plain_detr.detr import PlainDetr, build_model
from dinov3.heads.plain_detr.postprocess import PostProcess
from tests.heads.tiny import images, tiny_backbone

SMALL: dict[str, Any] = {
    "num_classes": 4,
    "hidden_dim": 32,
    "dim_feedforward": 16,
    "dec_layers": 2,
    "num_encoder_layers": 1,
    "num_queries_one2one": 6,
    "num_queries_one2many": 4,
    "decoder_rpe_hidden_dim": 8,
    "proposal_in_stride": 16,
    "proposal_tgt_strides": [8, 16, 32, 64],
    "layers_to_use": [3, 7],
}


def small_detector(**options: Any) -> PlainDetr:
    torch.manual_seed(0)
    return build_model(tiny_backbone(), DetectionHeadConfig(**SMALL | options))


def test_initial_values() -> None:
    model = small_detector()
    assert model.class_embed[0].bias.tolist() == pytest.approx([-4.59512] * 4)
    assert not any(p.any() for head in model.bbox_embed for p in head.layers[-1].parameters())
    assert not model.input_proj[0][0].bias.any() and model.transformer.level_embed.std() > 0.5
    assert model.transformer.decoder.layers[0].linear1.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_everything_but_the_backbone_learns(use_checkpoint: bool) -> None:
    # Small proposals, so that some of each stride are valid in small images.
    model = small_detector(decoder_use_checkpoint=use_checkpoint, n_windows_sqrt=2, proposal_min_size=8).train()
    with torch.no_grad():
        for head in model.bbox_embed:
            head.layers[-1].weight.normal_(std=0.02)
    outputs = model(list(images(96, 112, batch=2)))
    groups = [outputs, *outputs["aux_outputs"], *outputs["aux_outputs_one2many"], outputs["enc_outputs"]]
    tensors = [group[key] for group in groups for key in ("pred_logits", "pred_boxes")]
    tensors += [outputs["pred_logits_one2many"], outputs["pred_boxes_one2many"]]
    sum(x.float().square().mean() for x in tensors).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {name for name, _ in model.named_parameters() if ".backbone." in name}
    assert outputs["pred_logits"].shape == (2, 6, 4) and outputs["pred_logits_one2many"].shape == (2, 4, 4)


@pytest.mark.parametrize("look_forward_twice", [True, False])
def test_look_forward_twice_lets_gradients_reach_the_layer_before(look_forward_twice: bool) -> None:
    model = small_detector(look_forward_twice=look_forward_twice)
    model(list(images(96, 112)))["pred_boxes"].sum().backward()
    assert model.bbox_embed[0].layers[-1].weight.grad.any() == look_forward_twice


def test_more_queries_than_cells() -> None:
    model = small_detector(num_queries_one2one=300).switch_to_inference_queries().eval()
    with torch.no_grad():
        outputs = model(list(images(64, 64)))
    assert outputs["pred_boxes"].shape == (1, 64 + 16 + 4 + 1, 4)
    sizes = torch.tensor([[64, 64]])
    with pytest.raises(ValueError, match="topk=400: 85 queries and 4 classes make only 340 detections"):
        PostProcess(400, True)(outputs, sizes)
    assert len(PostProcess(400, True, allow_fewer=True)(outputs, sizes)[0]["scores"]) == 340


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_to_use": None}, "layers_to_use=None: it must be given"),
        ({"proposal_in_stride": None}, "proposal_in_stride=None: it must be given"),
        ({"proposal_tgt_strides": None}, "proposal_tgt_strides=None: it must be given"),
        ({"proposal_tgt_strides": [8, 16, 32]}, r"\[8, 16, 32\]: expected as many as proposal_feature_levels=4"),
        ({"proposal_tgt_strides": [8, 32, 16, 64]}, "each twice the one before"),
        ({"dropout": 1.0}, "dropout=1.0: expected at least 0 and less than 1"),
        ({"decoder_rpe_type": "log"}, "decoder_rpe_type='log'"),
        ({"num_queries_one2one": 0}, "num_queries_one2one=0: expected a whole number of at least 1"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_detector(**options)


def test_encodings_by_value() -> None:
    assert DetectionHeadConfig(position_embedding="sine_unnorm").position_embedding is PositionEncoding.SINE_UNNORM
