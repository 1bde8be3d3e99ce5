from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.heads.mask2former.head import Mask2FormerHead
from dinov3.heads.mask2former.semantic import semantic_scores
from dinov3.heads.segmentation import build_segmentation_decoder
from tests.heads.mask2former.small import HEAD, N_CLASSES, small_segmentor
from tests.heads.tiny import images, randomise_, tiny_backbone

WIDTHS = {"1": 6, "2": 8, "3": 10, "4": 12}


def head(**kwargs: Any) -> Mask2FormerHead:
    torch.manual_seed(0)
    model = Mask2FormerHead(WIDTHS, **{**HEAD, **kwargs})
    randomise_(model)
    return model.eval()


def pyramid(batch: int = 2, scale: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sides = {level: (2 * scale * 2 ** (4 - int(level)), 3 * scale * 2 ** (4 - int(level))) for level in WIDTHS}
    return {k: torch.randn(batch, WIDTHS[k], *sides[k], generator=generator) for k in sides}


def test_sizes_are_arguments() -> None:
    model = head(mask_dim=20, n_heads=4, n_points=2, n_encoder_layers=2, n_decoder_layers=4, n_queries=9, ffn_dim=40)
    out = model(pyramid())
    assert out["pred_logits"].shape == (2, 9, N_CLASSES + 1) and out["pred_masks"].shape == (2, 9, 16, 24)
    assert [p["pred_masks"].shape for p in out["aux_outputs"]] == [(2, 9, 16, 24)] * 4
    shapes = {name: tuple(entry.shape) for name, entry in model.state_dict().items()}
    assert shapes["predictor.transformer_ffn_layers.3.linear1.weight"] == (40, 32)
    assert shapes["pixel_decoder.encoder.encoder.layers.1.linear1.weight"] == (40, 32)
    assert shapes["pixel_decoder.encoder.encoder.layers.1.self_attn.attention_weights.weight"] == (4 * 3 * 2, 32)
    assert shapes["pixel_decoder.mask_feature.weight"] == (20, 32, 1, 1)


def test_published_sizes_are_the_defaults() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in Mask2FormerHead(dict.fromkeys("1234", 8)).state_dict().items()}
    assert shapes["predictor.class_embed.weight"] == (151, 2048) and shapes["predictor.query_feat.weight"][0] == 100
    assert shapes["predictor.transformer_ffn_layers.8.linear1.weight"] == (4096, 2048)
    assert "predictor.transformer_ffn_layers.9.linear1.weight" not in shapes
    assert shapes["pixel_decoder.encoder.encoder.layers.5.linear1.weight"] == (4096, 2048)
    assert "pixel_decoder.encoder.encoder.layers.6.linear1.weight" not in shapes


def test_levels_are_found_by_name_not_by_order() -> None:
    model, features = head(), pyramid()
    shuffled = {level: features[level] for level in "2413"}
    assert torch.equal(model(shuffled)["pred_masks"], model(features)["pred_masks"])
    again = head()
    again.load_state_dict(Mask2FormerHead({k: WIDTHS[k] for k in "2413"}, **HEAD).state_dict())


def test_gradients_reach_every_parameter_but_not_through_the_masks_that_guide() -> None:
    model = head()
    out = model(pyramid())
    (out["pred_logits"].square().mean() + out["pred_masks"].square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradients_flow_through_auxiliary_predictions() -> None:
    model = head()
    first = model(pyramid())["aux_outputs"][0]
    first["pred_masks"].square().mean().backward()
    assert model.predictor.query_feat.weight.grad is not None
    assert model.predictor.transformer_ffn_layers[0].linear1.weight.grad is None


def test_a_query_without_a_mask_sees_everything() -> None:
    model, features = head(), pyramid()
    mask_features, maps = model.pixel_decoder(features)
    with torch.no_grad():
        everywhere = model.predictor(maps, torch.zeros_like(mask_features))  # logits 0: seen
        model.predictor.mask_embed.layers[2].weight.zero_()  # type: ignore[union-attr]
        model.predictor.mask_embed.layers[2].bias.fill_(1.0)  # type: ignore[union-attr]
        nowhere = model.predictor(maps, -torch.ones_like(mask_features))  # logits below 0
    assert (nowhere[0]["pred_masks"] < 0).all()
    torch.testing.assert_close(nowhere[-1]["pred_logits"], everywhere[-1]["pred_logits"])


def test_predict_resizes_the_last_masks() -> None:
    model, features = head(), pyramid()
    last, got = model(features), model.predict(features, rescale_to=(30, 41))
    assert got.keys() == {"pred_logits", "pred_masks"}
    assert torch.equal(got["pred_logits"], last["pred_logits"])
    assert torch.equal(got["pred_masks"], F.interpolate(last["pred_masks"], (30, 41), mode="bilinear"))


def test_the_pixel_decoder_runs_in_float32_under_autocast() -> None:
    model, features = head(), pyramid()
    want, _ = model.pixel_decoder(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = model.pixel_decoder(features)
        assert model(features)["pred_masks"].dtype == torch.bfloat16
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_the_head_compiles_without_a_graph_break() -> None:
    model, features = head(n_decoder_layers=1), pyramid(1)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(features)["pred_masks"], model(features)["pred_masks"])


def test_one_step_lowers_a_loss() -> None:
    model = small_segmentor().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(3):
        torch.manual_seed(0)
        loss = (model(images(batch=2))["pred_logits"] - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert not model.segmentation_model[0].backbone.training


def test_shapes_are_known_without_data() -> None:
    model = small_segmentor().to("meta")
    out = model(images(64, 96, batch=2).to("meta"))
    assert out["pred_masks"].shape == (2, 7, 16, 24)
    assert semantic_scores(out["pred_logits"], out["pred_masks"], (64, 96)).shape == (2, N_CLASSES, 64, 96)


def test_predictions_do_not_depend_on_chance() -> None:
    model = small_segmentor()
    with torch.no_grad():
        assert torch.equal(model(images())["pred_masks"], model(images())["pred_masks"])


@pytest.mark.parametrize("size", [(59, 70), (5, 9), (1, 1)])
def test_images_of_any_size_are_padded_and_cut(size: tuple[int, int]) -> None:
    model = small_segmentor()
    x = images(*size, batch=2)
    with pytest.raises(ValueError, match=f"images of {size[0]} x {size[1]} pixels: .* multiples of 32"):
        model(x)
    rows, columns = -size[0] % 32, -size[1] % 32
    top, left = rows // 2, columns // 2
    framed = F.pad(x, (left, columns - left, top, rows - top))
    got = model.predict(x, size)
    want = model.predict(framed, tuple(framed.shape[-2:]))
    torch.testing.assert_close(got["pred_masks"], want["pred_masks"][..., top : top + size[0], left : left + size[1]])
    assert torch.equal(got["pred_logits"], want["pred_logits"]) and got.keys() == {"pred_logits", "pred_masks"}
    half = model.predict(x, (20, 10))["pred_masks"]
    torch.testing.assert_close(half, F.interpolate(got["pred_masks"], (20, 10), mode="bilinear"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 48}, "hidden_dim=48: expected a multiple of 32"),
        ({"hidden_dim": 96, "n_heads": 5}, "hidden_dim=96: expected a multiple of n_heads=5"),
    ],
)
def test_widths_that_do_not_fit_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head(**options)


def test_missing_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"input_shape lacks the levels \['3', '1'\]"):
        Mask2FormerHead({"2": 8, "4": 8}, **HEAD)


def test_blocks_are_checked_when_the_model_is_built() -> None:
    with pytest.raises(ValueError, match=r"interaction_indexes=\[7\]: a ViT-Adapter reads 4 blocks"):
        build_segmentation_decoder(tiny_backbone(), "LAST", decoder_type="m2f", **HEAD)
    with pytest.raises(TypeError, match="ffn_dims"):
        build_segmentation_decoder(tiny_backbone(), decoder_type="m2f", ffn_dims=3)
