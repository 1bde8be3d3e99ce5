"""Golden cases of `detection`: boxes, readers, encoder, proposals, decoder, post-processing and the whole detector."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.heads.plain_detr.backbone import build_position_encoding
from dinov3.heads.plain_detr.detr import PlainDetr, refine_boxes
from dinov3.heads.plain_detr.postprocess import DetectorWithProcessor
from dinov3.layers.boxes import box_cxcywh_to_xyxy
from dinov3.models.vision_transformer import DinoVisionTransformer
from tests.parity import golden
from tests.parity.deterministic import fill_, tensor, uniform, value_for
from tests.parity.state_dicts import assert_matches_manifest

box_ops = "dinov3.eval.detection.util.box_ops."
Config = golden.target("dinov3.eval.detection.config.DetectionHeadConfig")
PositionEncoding = golden.target("dinov3.eval.detection.models.position_encoding.PositionEncoding")
PostProcess = golden.target("dinov3.eval.detection.models.detr.PostProcess")
build_model = golden.target("dinov3.eval.detection.models.detr.build_model")
nested_tensor_from_tensor_list = golden.target("dinov3.eval.detection.util.misc.nested_tensor_from_tensor_list")

#: The valid rows and columns of two images on a grid.
GRID, ROWS, COLUMNS = (27, 26), (27, 17), (26, 19)


def case_of(name: str) -> dict[str, Any]:
    return golden.case("detection", name)


def assert_output(name: str, output: str, got: Tensor) -> None:
    """Compare a whole output with what the case stores of it, within the tolerance of its area."""
    entry = next(o for o in case_of(name)["outputs"] if o["name"] == output)
    want = golden.tensors("detection")[entry["key"]]
    assert list(got.shape) == entry["shape"] and str(got.dtype) == f"torch.{entry['dtype']}", (output, got.shape)
    step = 1 if entry["stored"] == "full" else int(re.fullmatch(r"flatten\(\)\[::(\d+)\]", entry["stored"])[1])  # type: ignore[index]
    part = got.detach().flatten()[::step]
    if not got.is_floating_point():
        assert torch.equal(part, want.flatten()), output
        return
    atol = max(20 * entry.get("float32_noise", 0.0), 1e-5 * entry["abs_max"])
    torch.testing.assert_close(part, want.flatten(), rtol=0, atol=atol, msg=lambda text: f"{output}: {text}")
    whole = got.detach().double()
    statistics = (whole.mean().item(), whole.std(correction=0).item(), whole.abs().max().item())
    assert statistics == pytest.approx((entry["mean"], entry["std"], entry["abs_max"]), rel=0, abs=atol), output


def config_of(name: str) -> Any:
    settings = dict(case_of(name)["build"]["config"])
    settings["position_embedding"] = PositionEncoding[settings["position_embedding"].partition(".")[2]]
    return Config(**settings)


@functools.cache
def detector(name: str = "detector") -> PlainDetr:
    """The filled detector of a case, with its inference queries; shared, so tests must not change it."""
    case = case_of(name)
    vit = DinoVisionTransformer(**case["build"]["vit"])
    vit.init_weights()
    model = build_model(vit, config_of(name))
    seed = case["fill"]["seed"]
    fill_(model, seed)
    with torch.no_grad():
        for key, entry in model.named_parameters():  # Without the second names of tied entries.
            if "class_embed" in key or "bbox_embed" in key:
                outer = key.removeprefix("transformer.decoder.")
                entry.copy_(value_for(outer, tuple(entry.shape), seed))
        for step in case["fill"]["then"]:
            for key, entry in model.state_dict().items():
                if re.search(step["pattern"], key):
                    entry.mul_(step["multiply"])
    if any("switch to inference" in step for step in case["build"]["steps"]):
        model.switch_to_inference_queries()
    return model.eval()


def images_of(name: str) -> list[Tensor]:
    found = [re.fullmatch(r"(im\d) = T\('im\d', (\[.*\]), (\d+)\)", text) for text in case_of(name)["inputs"]]
    return [tensor(m[1], tuple(ast.literal_eval(m[2])), int(m[3])) for m in found if m]


def mask_of(shape: tuple[int, int], rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    mask = torch.ones(len(rows), *shape, dtype=torch.bool)
    for b, (row, column) in enumerate(zip(rows, columns, strict=True)):
        mask[b, :row, :column] = False
    return mask


def cells(name: str) -> Tensor:
    return tensor(name, (2, GRID[0] * GRID[1], 64), 12)


def boxes_on_grid() -> Tensor:
    return torch.cat([uniform("ref_ctr", (2, 12, 2), 12) * 416, uniform("ref_wh", (2, 12, 2), 12) * 90 + 4], dim=-1)


def boxes_in_images() -> Tensor:
    return torch.cat([uniform("ctr", (2, 24, 2), 11) * 300, uniform("wh", (2, 24, 2), 11) * 180.0 + 1], dim=-1)


def test_boxes() -> None:
    boxes, delta = boxes_in_images(), tensor("delta", (2, 24, 4), 11) * torch.tensor([1, 1, 3, 3])
    max_shape = (torch.tensor([280, 190]).view(2, 1, 1), torch.tensor([170, 300]).view(2, 1, 1))
    to_xyxy, to_cxcywh, decode, encode, logit = (
        golden.target(box_ops + f)
        for f in ("box_cxcywh_to_xyxy", "box_xyxy_to_cxcywh", "delta2bbox", "bbox2delta", "inverse_sigmoid")
    )
    got = {
        "xyxy": to_xyxy(boxes),
        "cxcywh_of_xyxy": to_cxcywh(to_xyxy(boxes)),
        "delta2bbox": decode(boxes, delta),
        "delta2bbox_clipped": decode(boxes, delta, max_shape),
        "delta2bbox_ctr": decode(boxes, 5 * delta, max_shape, wh_ratio_clip=0.25, add_ctr_clamp=True, ctr_clamp=8),
        "delta2bbox_noborder": decode(boxes, delta, max_shape, clip_border=False),
        "bbox2delta": encode(boxes[0], boxes[1]),
        "bbox2delta_pairs": encode(boxes[0], boxes[1][:3], means=(0.1, 0, 0.2, 0), stds=(0.5, 1, 2, 1)),
        "inverse_sigmoid": logit(tensor("p", (40,), 11)),
    }
    for name, value in got.items():
        assert_output("boxes", name, value)


def test_nested_tensor() -> None:
    tensors, mask = nested_tensor_from_tensor_list(images_of("nested-tensor")).decompose()
    assert_output("nested-tensor", "tensors", tensors)
    assert_output("nested-tensor", "mask", mask)


@pytest.mark.parametrize(
    ("name", "kind", "n_features", "mask"),
    [
        ("pos-sine", "SINE", 8, mask_of((6, 5), (6, 4), (3, 5))),
        ("pos-sine-unnorm", "SINE_UNNORM", 6, mask_of((4, 3), (3,), (3,))),
        ("pos-learned", "LEARNED", 5, mask_of((3, 7), (3, 3), (7, 7))),
    ],
)
def test_position_encodings(name: str, kind: str, n_features: int, mask: Tensor) -> None:
    encoding = build_position_encoding(PositionEncoding[kind], n_features)
    if "fill" in case_of(name):
        fill_(encoding, case_of(name)["fill"]["seed"])
    assert_output(name, "pos", encoding(mask))


@pytest.mark.parametrize("name", ["backbone-windows-3", "backbone-windows-2", "backbone-plain"])
def test_readers(name: str) -> None:
    model, batch = detector(name), nested_tensor_from_tensor_list(images_of(name))
    features, mask, pos = model.backbone(batch)
    for output, got in (("features", features), ("mask", mask), ("pos", pos)):
        assert_output(name, output, got)
    # Projecting each map before maps are resized and joined changes nothing.
    weight = tensor("weight", (8, features.shape[1]), 0) / features.shape[1] ** 0.5
    projected, _, _ = model.backbone(batch, weight)
    torch.testing.assert_close(projected, torch.einsum("ec,bchw->behw", weight, features), rtol=0, atol=2e-5)


def test_encoder() -> None:
    mask = mask_of(GRID, ROWS, COLUMNS).flatten(1)
    encoder = detector().transformer.encoder
    assert encoder is not None
    assert_output("encoder", "memory", encoder(cells("src"), mask, cells("pos")))


def test_proposals() -> None:
    transformer = detector().transformer
    proposals = transformer.propose(cells("memory"), mask_of(GRID, ROWS, COLUMNS))
    assert proposals.max_shape is not None
    logits = transformer.decoder.class_embed[-1](proposals.memory)
    deltas = transformer.decoder.bbox_embed[-1](proposals.memory)
    boxes = refine_boxes(proposals.boxes, deltas, proposals.max_shape)
    best = logits[..., 0].topk(20, dim=1).indices
    got = {
        "output_memory": proposals.memory,
        "output_proposals": proposals.boxes,
        "max_height": proposals.max_shape[0],
        "max_width": proposals.max_shape[1],
        "reference_points": boxes.gather(1, best[..., None].expand(-1, -1, 4)),
        "enc_logits": logits,
        "enc_boxes": boxes,
        "enc_delta": deltas,
    }
    for name, value in got.items():
        assert_output("proposals", name, value)
    invalid = (proposals.boxes == max(2 * side for side in GRID) * 8.0).all(-1)
    assert (~invalid).sum(1).tolist() == case_of("proposals")["facts"]["valid_proposals"]


def test_encoding_of_proposals() -> None:
    assert_output("proposal-pos-embed", "pos", detector().transformer.get_proposal_pos_embed(boxes_on_grid()))


@pytest.mark.parametrize("name", ["rpe-layer-linear", "rpe-layer-abs-log8"])
def test_decoder_layer(name: str) -> None:
    layer = detector(name).transformer.decoder.layers[0]
    queries, query_pos, src = tensor("tgt", (2, 12, 64), 12), tensor("qpos", (2, 12, 64), 12), cells("src")
    corners, mask = box_cxcywh_to_xyxy(boxes_on_grid()), mask_of(GRID, ROWS, COLUMNS)
    key = src + cells("pos")
    first = torch.arange(12) < 6
    assert_output(name, "cross_attention", layer.cross_attn(queries + query_pos, key, src, corners, mask))
    seen = first[:, None] == first
    assert_output(name, "layer", layer(queries, query_pos, key, src, corners, mask, seen))
    assert_output(name, "layer_no_self_mask", layer(queries, query_pos, key, src, corners, mask))


def test_decoder() -> None:
    max_shape = (16 * torch.tensor(ROWS).view(2, 1, 1), 16 * torch.tensor(COLUMNS).view(2, 1, 1))
    queries, query_pos = tensor("tgt", (2, 12, 64), 12), tensor("qpos", (2, 12, 64), 12)
    hidden, boxes, _ = detector().transformer.decoder(
        queries,
        query_pos,
        boxes_on_grid(),
        cells("src"),
        cells("pos"),
        mask_of(GRID, ROWS, COLUMNS),
        refine=functools.partial(refine_boxes, max_shape=max_shape),
    )
    assert_output("decoder", "hidden", hidden)
    assert_output("decoder", "references", boxes)


def test_postprocess() -> None:
    logits, boxes = tensor("logits", (2, 10, 7), 11), boxes_in_images()[:, :10]
    sizes, original = torch.tensor([[200, 180], [150, 260]]), torch.tensor([[400, 360], [75, 390]])
    for kind, scale in (("reparam", 1), ("plain", 300)):
        outputs = {"pred_logits": logits, "pred_boxes": boxes / scale}
        found = PostProcess(topk=15, reparam=kind == "reparam")(outputs, sizes, original)
        for key in ("scores", "labels", "boxes"):
            assert_output("postprocess", f"{kind}_{key}", torch.stack([image[key] for image in found]))


@pytest.mark.parametrize(
    "name", ["detector", "detector-one2many", "detector-single", "detector-plain", "detector-variants"]
)
@torch.no_grad()
def test_detector(name: str) -> None:
    model, images = detector(name), images_of(name)
    outputs = model(images)
    flat = {key: value for key, value in outputs.items() if isinstance(value, Tensor)}
    flat |= {f"enc_outputs_{key}": value for key, value in outputs["enc_outputs"].items()}
    flat |= {f"{part}_{k}": v for part in ("aux_outputs", "aux_outputs_one2many") for k, v in outputs[part][0].items()}
    found = DetectorWithProcessor(model, PostProcess(model.config.topk, model.config.reparam))(images)
    flat |= {key: torch.stack([image[key] for image in found]) for key in ("scores", "labels", "boxes")}
    for output in case_of(name)["outputs"]:
        assert_output(name, output["name"], flat[output["name"]])


def test_entries_of_the_tiny_model() -> None:
    model = detector()
    assert_matches_manifest(model, "detection_tiny")
    state = model.state_dict()
    tied = [name for name in state if name.startswith("transformer.decoder.") and "_embed" in name]
    assert len(tied) == 32
    assert all(state[k].data_ptr() == state[k.removeprefix("transformer.decoder.")].data_ptr() for k in tied)


def test_every_case_is_run() -> None:
    names = {node.value for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Constant)}
    assert {case["id"] for case in golden.cases("detection")} <= names
