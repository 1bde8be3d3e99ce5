"""The published detector by name: where its two weights may come from, images of any size, and what is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.heads.plain_detr.postprocess import DetectorWithProcessor, PostProcess
from dinov3.hub import backbones, sources
from dinov3.hub.architectures import PUBLISHED as ARCHITECTURES
from dinov3.hub.architectures import PublishedViT
from dinov3.hub.backbones import Weights, dinov3_vitl16plus
from dinov3.hub.detectors import DetectionWeights, build_detector, dinov3_vit7b16_de
from dinov3.utils.weight_files import WeightsError
from tests.heads.tiny import randomise_
from tests.parity.state_dicts import assert_matches_manifest

SMALL = {
    "num_classes": 5,
    "hidden_dim": 32,
    "nheads": 4,
    "dim_feedforward": 24,
    "dec_layers": 2,
    "num_encoder_layers": 1,
    "num_queries_one2one": 12,
    "num_queries_one2many": 6,
    "decoder_rpe_hidden_dim": 8,
    "topk": 7,
}
BACKBONE = "detector.backbone.0._backbone.backbone."


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The backbone in a size for tests, and a cache of its own."""
    hashes = {"LVD1689M": "a955f4ea", "SAT493M": "a6675841"}
    small = PublishedViT(32, 8, 1, 2, "swiglu64", hashes, untied=frozenset(hashes))
    monkeypatch.setitem(ARCHITECTURES, "dinov3_vit7b16", small)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A filled model, and the paths of its parts, the head as published."""
    torch.manual_seed(0)
    model = dinov3_vit7b16_de(pretrained=False, **SMALL)
    randomise_(model)
    with torch.no_grad():
        for head in model.detector.bbox_embed:
            head.layers[-1].weight.normal_(std=0.02)
    state = model.state_dict()
    head = {k.removeprefix("detector."): v for k, v in state.items() if not k.startswith(BACKBONE)}
    torch.save(model.detector.get_submodule(BACKBONE[9:-1]).state_dict(), tmp_path / "backbone.pth")
    torch.save({"model": head}, tmp_path / "head.pth")
    return {"backbone": tmp_path / "backbone.pth", "head": tmp_path / "head.pth", "model": model, "state": state}


def load(files: dict[str, Any], **kwargs: Any) -> DetectorWithProcessor:
    return dinov3_vit7b16_de(**{"weights": files["head"], "backbone_weights": files["backbone"], **SMALL, **kwargs})


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    loaded = model.state_dict()
    assert list(loaded) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


def photos(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(3, *size, generator=torch.Generator().manual_seed(sum(size))) for size in sizes]


@torch.no_grad()
def detect(model: DetectorWithProcessor, images: list[Tensor]) -> list[dict[str, Tensor]]:
    return model(images)


def test_both_weights_from_files(files: dict[str, Any]) -> None:
    model = load(files)
    assert_holds(model, files["state"])
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad != name.startswith(BACKBONE) for name, p in model.named_parameters())
    # The second names of the heads stay names of the same parameters.
    assert model.detector.transformer.decoder.bbox_embed[1] is model.detector.bbox_embed[1]
    images = photos((97, 130), (112, 80))
    once, again = detect(model, images), detect(model, images)
    for first, second in zip(once, again, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in ("scores", "labels", "boxes"))
        assert first["scores"].shape == (7,) and (first["scores"].diff() <= 0).all() and first["labels"].max() < 5


def test_weights_of_the_head_in_every_form(files: dict[str, Any], tmp_path: Path) -> None:
    head = torch.load(files["head"])["model"]
    # The backbone in a whole model is left out: it comes from its own file.
    whole = {name: entry + 1 if name.startswith(BACKBONE) else entry for name, entry in files["state"].items()}
    torch.save(whole, tmp_path / "whole.pth")
    outer = {name: entry for name, entry in head.items() if not name.startswith("transformer.decoder.class_embed")}
    inner = {name: entry for name, entry in head.items() if not name.startswith(("class_embed", "bbox_embed"))}
    for weights in (tmp_path / "whole.pth", head, outer, inner, {f"module.{k}": v for k, v in inner.items()}):
        assert_holds(load(files, weights=weights, mmap=False), files["state"])
    missing = {name: entry for name, entry in outer.items() if not name.startswith("class_embed.1.")}
    with pytest.raises(WeightsError, match="4 missing .*class_embed.1.weight"):
        load(files, weights=missing)


def test_published_weights_come_from_their_addresses(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(url: str, path: Path, **_: Any) -> None:
        asked.append(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files["head" if "head" in url else "backbone"].read_bytes())

    monkeypatch.setattr(sources, "download", download)
    assert_holds(dinov3_vit7b16_de(weights="coco2017", **SMALL), files["state"])
    assert asked == [
        backbones.url_of("dinov3_vit7b16", Weights.LVD1689M),
        "https://dl.fbaipublicfiles.com/dinov3/dinov3_vit7b16/dinov3_vit7b16_coco2017_detr_head-b0235ff7.pth",
    ]


@pytest.mark.parametrize("side", [1, 16, 33, 47, 64, 79, 100, 110, 131, 177, 200])
def test_images_of_any_size(files: dict[str, Any], side: int) -> None:
    other = 233 - side
    for found, (height, width) in zip(
        detect(files["model"], photos((side, other), (other, side))), ((side, other), (other, side)), strict=True
    ):
        assert found["boxes"].isfinite().all() and (found["boxes"] >= 0).all()
        assert (found["boxes"] <= torch.tensor([width, height, width, height])).all()


def test_boxes_reach_the_last_pixels(files: dict[str, Any]) -> None:
    with torch.no_grad():
        for head in files["model"].detector.bbox_embed:
            head.layers[-1].bias[2:] = 4.0  # Boxes grow beyond the image.
    image = photos((127, 116))
    for found in detect(files["model"], image):
        torch.testing.assert_close(found["boxes"], torch.tensor([[0.0, 0.0, 116.0, 127.0]]).expand(7, 4))
    literal = DetectorWithProcessor(files["model"].detector, PostProcess(7, True))
    # As published, they end with the last whole patch.
    assert torch.equal(detect(literal, image)[0]["boxes"], torch.tensor([[0.0, 0.0, 112.0, 112.0]]).expand(7, 4))


def test_detections_do_not_depend_on_the_other_images(files: dict[str, Any]) -> None:
    images = photos((97, 130), (160, 200), (97, 131), (80, 80), (160, 200))
    together = detect(files["model"], images)
    for image, found in zip(images, together, strict=True):
        only = detect(files["model"], [image])[0]
        assert torch.equal(found["labels"], only["labels"])
        torch.testing.assert_close(found["boxes"], only["boxes"], rtol=0, atol=2e-3)
    literal = DetectorWithProcessor(files["model"].detector, PostProcess(7, True))
    shifted = (detect(literal, images)[0]["scores"] - detect(literal, images[:1])[0]["scores"]).abs().max()
    assert shifted > 1e-3


def test_sizes_that_need_no_padding_are_as_published(files: dict[str, Any]) -> None:
    literal = DetectorWithProcessor(files["model"].detector, PostProcess(7, True))
    for image in photos((80, 160), (112, 96)):
        got, want = detect(files["model"], [image])[0], detect(literal, [image])[0]
        assert all(torch.equal(got[key], want[key]) for key in got)


def test_lists_that_are_no_images(files: dict[str, Any]) -> None:
    model = files["model"]
    assert model([]) == []
    for images, message in (
        ([torch.zeros(1, 90, 90)], r"image 0 is torch.float32 of shape \[1, 90, 90\]: .*convert grey"),
        ([torch.zeros(3, 90, 90), torch.zeros(4, 90, 90)], r"image 1 .*\[4, 90, 90\]"),
        ([torch.zeros(3, 90, 90, dtype=torch.uint8)], "image 0 is torch.uint8"),
        ([torch.zeros(3, 0, 90)], r"image 0 .*\[3, 0, 90\]"),
        (torch.zeros(2, 3, 90, 90), r"expected a list of images .* one tensor of shape \[2, 3, 90, 90\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(images)


def test_topk_and_number_of_classes_are_honoured(files: dict[str, Any]) -> None:
    assert len(detect(load(files, topk=3), photos((96, 96)))[0]["scores"]) == 3
    model = dinov3_vit7b16_de(pretrained=False, **SMALL | {"num_classes": 1, "topk": 100})
    # Not more than there are pairs of queries and classes.
    assert len(detect(model, photos((96, 96)))[0]["scores"]) == 12
    default = dinov3_vit7b16_de(pretrained=False, device="meta")
    assert default.postprocessor.topk == 1500 and default.detector.num_queries == 1500
    assert default.detector.transformer.two_stage_num_proposals == 1500


def test_dtype_and_autocast(files: dict[str, Any]) -> None:
    model = load(files, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    found = detect(model, [image.bfloat16() for image in photos((97, 130))])[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = detect(files["model"], photos((97, 130)))[0]
    for got in (found, mixed):
        assert got["boxes"].dtype == got["scores"].dtype == torch.float32 and got["boxes"].isfinite().all()


def test_heads_of_other_sizes_and_interchanged_files(files: dict[str, Any]) -> None:
    with pytest.raises(
        WeightsError, match="width 32 and 6 classes .* width 32 and 5 classes .*class_embed.0.weight is"
    ):
        load(files, num_classes=6)
    with pytest.raises(WeightsError, match="the weights of a backbone: pass them as backbone_weights=, and the head"):
        load(files, weights=files["backbone"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"two_stage": False}, "two_stage=False is not supported: only two_stage=True works"),
        ({"with_box_refine": False}, "with_box_refine=False is not supported"),
        ({"decoder_type": "global_ape"}, "decoder_type='global_ape' is not supported"),
        ({"num_feature_levels": 4}, "num_feature_levels=4 is not supported"),
        ({"blocks_to_train": [39]}, r"blocks_to_train=\[39\] is not supported"),
        ({"num_clases": 21}, "no keyword argument 'num_clases' .did you mean 'num_classes'"),
        ({"hidden_dim": 48}, "hidden_dim=48: expected a multiple of 32"),
        ({"nheads": 5}, "hidden_dim=32: expected a multiple of nheads=5"),
        ({"topk": 0}, "topk=0: expected a whole number of at least 1"),
        ({"norm_type": "prenorm"}, "norm_type='prenorm' .did you mean 'pre_norm'"),
        ({"position_embedding": "sin"}, "position_embedding='sin' .did you mean 'sine'"),
        ({"proposal_tgt_strides": [16, 32]}, "expected as many as proposal_feature_levels=4"),
        ({"proposal_tgt_strides": [12, 24, 48, 96]}, "expected proposal_in_stride=16 times powers of two"),
        ({"layers_to_use": [1, 9]}, "different indices from 0 to 7"),
        ({"weights": "coco2018"}, "no weights at coco2018"),
    ],
)
def test_bad_arguments(files: dict[str, Any], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        load(files, **kwargs)


def test_entries_of_the_published_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = dinov3_vit7b16_de(pretrained=False, device="meta")
    assert all(entry.is_meta for entry in model.state_dict().values())
    assert_matches_manifest(model, "dinov3_vit7b16_de")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 129_070_745
    large = build_detector(dinov3_vitl16plus(pretrained=False, device="meta"), n_windows_sqrt=2)
    assert large.detector.config.layers_to_use == [5, 11, 17, 23]


def test_signature() -> None:
    *arguments, last = inspect.signature(dinov3_vit7b16_de).parameters.values()
    assert {argument.name: argument.default for argument in arguments} == {
        "pretrained": True,
        "weights": DetectionWeights.COCO2017,
        "backbone_weights": Weights.LVD1689M,
        "check_hash": False,
    }
    assert last.kind is inspect.Parameter.VAR_KEYWORD
    assert {member.name: member.value for member in DetectionWeights} == {"COCO2017": "COCO2017"}
