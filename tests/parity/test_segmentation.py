"""Golden cases of `segmentation`: the wired model, inference, metrics and losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.eval.segmentation import loss as losses
from dinov3.eval.segmentation import metrics
from dinov3.eval.segmentation.inference import make_inference
from dinov3.heads.backbone_layers import BackboneLayersSet
from dinov3.heads.segmentation import FeatureDecoder, build_segmentation_decoder
from dinov3.hub.backbones import dinov3_vit7b16, dinov3_vits16
from dinov3.models.convnext import ConvNeXt
from tests.parity import deterministic, golden
from tests.parity.dense import assert_expected, assert_output, case_of, make_input, tiny_vit
from tests.parity.dense import by_id as by_id_of_area
from tests.parity.toy_segmentor import ToySegmentor

by_id = functools.partial(by_id_of_area, "segmentation")
case = functools.partial(case_of, "segmentation")
softmax = functools.partial(torch.softmax, dim=1)


def build(case: dict[str, Any]) -> FeatureDecoder:
    build, described = case["build"], case["build"].get("backbone")
    if isinstance(described, dict):
        assert golden.target(described["class"]) is ConvNeXt
        backbone: nn.Module = ConvNeXt(**described["kwargs"])
        backbone.init_weights()
    else:
        backbone = tiny_vit("segmentation", **build.get("vit_over", {}))
    _, layers, decoder = build["args"]
    assert golden.target(build["function"]) is build_segmentation_decoder
    layers = BackboneLayersSet[layers.removeprefix("BackboneLayersSet.")]
    model = build_segmentation_decoder(backbone, layers, decoder, **build["kwargs"])
    deterministic.fill_(model, build["fill_seed"])
    return model.eval()


@by_id("decoder/")
def test_wired_model(case: dict[str, Any]) -> None:
    model = build(case)
    got = {"out": model(make_input(case, "x"))}
    if "x_odd" in case["inputs"]:
        got["predict"] = model.predict(make_input(case, "x"), make_input(case, "rescale_to"))
        got["out_odd"] = model(make_input(case, "x_odd"))
    assert got.keys() == case["outputs"].keys()
    for name, output in got.items():
        assert_output(case, name, output)
    if "expected" in case:
        entries = list(model.state_dict())
        got_facts = {
            "layers": model.segmentation_model[0].n,
            "head_entries": [name for name in entries if name.startswith("segmentation_model.1.")],
            "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
            "backbone_prefix": entries[0].removesuffix("cls_token"),
        }
        assert_expected(case, got_facts, case["expected"])


def described_entries(model: nn.Module, part: str = "") -> list[str]:
    entries = {name: entry for name, entry in model.state_dict().items() if part in name}
    shapes = {name: "x".join(map(str, entry.shape)) or "-" for name, entry in entries.items()}
    return sorted(f"{name} {str(e.dtype).removeprefix('torch.')} {shapes[name]}" for name, e in entries.items())


def manifest(name: str) -> list[str]:
    return sorted((golden.HERE / "state_dict" / f"segmentation_linear_{name}.txt").read_text().splitlines())


def test_entries_of_the_whole_model_and_of_what_training_saves() -> None:
    with torch.device("meta"):
        small = build_segmentation_decoder(dinov3_vits16(pretrained=False), BackboneLayersSet.LAST, "linear")
        large = build_segmentation_decoder(dinov3_vit7b16(pretrained=False), BackboneLayersSet.LAST, "linear")
    assert described_entries(small) == manifest("vits16")
    assert described_entries(large, "segmentation_model.1") == manifest("vit7b16_head")
    assert all(entry.is_meta for entry in small.state_dict().values())


def toy(case: dict[str, Any]) -> ToySegmentor:
    described = case["build"]["toy"]
    return ToySegmentor(described["K"], described["seed"], described.get("Q"))


def options(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in kwargs.items()}


@by_id(
    "inference/slide-exact",
    "inference/slide-ragged",
    "inference/slide-crop-larger",
    "inference/slide-stride-equals-crop",
    "inference/slide-rectangular",
    "inference/slide-num-max-forward",
)
@pytest.mark.parametrize("max_windows", [None, 1, 4])
def test_sliding_windows(case: dict[str, Any], max_windows: int | None) -> None:
    model, x = toy(case), make_input(case, "x")
    infer = functools.partial(
        make_inference, x, model, "slide", "linear", max_windows_per_batch=max_windows, **options(case["kwargs"])
    )
    assert_output(case, "out", infer())
    expected = case["expected"]
    if "number_of_calls" in expected:
        assert len(model.calls) == expected["number_of_calls"] and model.calls[-1] == expected["last_call"]
    elif max_windows == 4:
        windows = [[[1, *shape[1:]], size] for shape, size in model.calls for _ in range(shape[0])]
        assert windows == expected["windows"] and len(model.calls) == -(-len(windows) // 4)
    else:
        assert model.calls == expected["windows"]
    if "flip_softmax" in case["outputs"]:
        assert_output(case, "flip_softmax", infer(apply_horizontal_flip=True, output_activation=softmax))


@by_id("inference/whole-")
def test_whole_image(case: dict[str, Any]) -> None:
    model, x = toy(case), make_input(case, "x")
    infer = functools.partial(make_inference, x, model, inference_mode="whole", **options(case["kwargs"]))
    assert_output(case, "out", infer())
    assert model.calls == case["expected"]["windows"]
    assert_output(case, "flip_sigmoid", infer(apply_horizontal_flip=True, output_activation=torch.sigmoid))


@by_id("inference/m2f")
def test_queries_become_class_maps(case: dict[str, Any]) -> None:
    model, x = toy(case), make_input(case, "x")
    for mode, kwargs in case["kwargs"].items():
        output = make_inference(x, model, mode, "m2f", **options(kwargs))
        assert_output(case, mode, output, case["tol"].get(mode))


@by_id("inference/slide-vit")
def test_sliding_windows_of_a_vit(case: dict[str, Any]) -> None:
    model, x = build(case), make_input(case, "x")
    output = make_inference(x, model, "slide", "linear", output_activation=softmax, **options(case["kwargs"]))
    assert_output(case, "prob", output)
    histogram = output.argmax(dim=1).flatten().bincount(minlength=output.shape[1])
    assert int((histogram - torch.tensor(case["expected"]["class_histogram"])).abs().sum()) <= 5


@by_id("metrics/reduce-zero-label")
def test_labels_without_zero(case: dict[str, Any]) -> None:
    for name, want in case["expected"].items():
        label = torch.tensor([0, 1, 2, 77, 149, 150, 254, 255], dtype=getattr(torch, name.removeprefix("torch.")))
        before = label.clone()
        got = metrics.preprocess_nonzero_labels(label)
        assert got.tolist() == want and got.dtype == label.dtype and torch.equal(label, before)


def make_maps(case: dict[str, Any], index: int) -> tuple[Tensor, Tensor]:
    n_classes, reduce = case["kwargs"]["num_classes"], case["kwargs"]["reduce_zero_label"]
    keep = make_input(case, f"keep_u{index}")
    pred, label = ((n_classes * make_input(case, f"{name}_u{index}")).floor().long() for name in ("pred", "label"))
    pred = torch.where(keep < 0.6, label, pred)
    pred[pred == 5] = 6
    label[(label == 3) | (label == 5)] = 1
    label[(label == 7) & (pred == 7)] = 0
    if reduce:
        label += 1
    label[keep > 0.93] = 255
    if reduce:
        label[(keep > 0.88) & (keep <= 0.93)] = 0
    return pred.to(torch.uint8), label.to(torch.uint8)


@by_id("metrics/intersect-union-")
def test_areas_and_metrics(case: dict[str, Any]) -> None:
    areas = []
    for index in range(len(case["outputs"])):
        areas.append(metrics.calculate_intersect_and_union(*make_maps(case, index), **case["kwargs"]))
        assert areas[-1].dtype == torch.int64
        # Published as float32, which holds such counts exactly.
        assert_output(case, f"areas{index}", areas[-1].float())
    groups = ["mIoU", "dice", "fscore"]
    by_class = metrics.total_area_to_metrics(*torch.stack(areas).sum(dim=0), metrics=groups)
    got = {
        "metrics": metrics.calculate_segmentation_metrics(areas, metrics=groups),
        "metrics_beta2": metrics.calculate_segmentation_metrics(areas, metrics=groups, beta=2),
        "per_class_IoU": by_class["mIoU"].tolist(),
        "per_class_acc": by_class["acc"].tolist(),
        "per_class_fscore": by_class["fscore"].tolist(),
    }
    assert_expected(case, got, case["expected"])


def make_label(case: dict[str, Any]) -> Tensor:
    label = (case["inputs"]["pred"]["shape"][1] * make_input(case, "label_u")).floor().long()
    return torch.where(make_input(case, "ignore_u") < 0.2, 255, label)


def assert_loss(case: dict[str, Any], loss: Callable[[Tensor, Tensor], Tensor], target: Tensor) -> None:
    pred = make_input(case, "pred").requires_grad_()
    value = loss(pred, target)
    value.backward()
    assert_expected(case, {"loss": value.item()}, case["expected"])
    assert pred.grad is not None
    assert_output(case, "grad", pred.grad)


LOSSES: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "ce": lambda case: losses.CrossEntropyLoss(),
    "ce-non-ignore": lambda case: losses.CrossEntropyLoss(avg_non_ignore=True),
    "ce-weights": lambda case: losses.CrossEntropyLoss(class_weight=make_input(case, "class_weight"), loss_weight=0.7),
    "ce-sum": lambda case: losses.CrossEntropyLoss(reduction="sum"),
    "dice": lambda case: losses.DiceLoss(),
    "dice-options": lambda case: losses.DiceLoss(
        smooth=0.5, exponent=1, loss_weight=2.0, ignore_index=2, class_weight=[0.5 + 0.25 * k for k in range(6)]
    ),
    "multi-ce": lambda case: losses.MultiSegmentationLoss(celoss_weight=1.3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_class_labels(name: str) -> None:
    golden_case = case(f"loss/{name}")
    assert_loss(golden_case, LOSSES[name](golden_case), make_label(golden_case))


def test_loss_of_ignored_pixels_alone() -> None:
    golden_case = case("loss/ce-all-ignored")
    pred = make_input(golden_case, "pred")
    label = torch.full((1, 4, 4), 255)
    got = [losses.CrossEntropyLoss(avg_non_ignore=valid)(pred, label).item() for valid in (False, True)]
    assert_expected(golden_case, {"loss": got}, golden_case["expected"])


def test_multilabel_dice() -> None:
    golden_case = case("loss/multilabel-dice")
    target = (make_input(golden_case, "target_u") < 0.3).float()
    assert_loss(golden_case, losses.MultiSegmentationLoss(diceloss_weight=0.8), target)


def test_binary_dice() -> None:
    golden_case = case("loss/binary-dice")
    target, mask = make_input(golden_case, "target_u") < 0.3, make_input(golden_case, "mask_u") < 0.8
    loss = functools.partial(losses.binary_dice_loss, make_input(golden_case, "pred"), target, valid_mask=mask)
    got = {"mean": loss().item(), "none": loss(reduction="none").tolist()}
    assert_expected(golden_case, got, golden_case["expected"])


def test_every_loss_case_is_run() -> None:
    others = {"ce-all-ignored", "multilabel-dice", "binary-dice"}
    found = {
        entry["id"].removeprefix("segmentation/loss/") for entry in golden.cases("segmentation", "segmentation/loss/")
    }
    assert found == LOSSES.keys() | others
