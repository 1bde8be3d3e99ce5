"""Mask2Former models from the command line to figures and maps, on scenes of which no side is a multiple of 32."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.eval.command.config import parse_arguments, read_config
from dinov3.eval.segmentation import predict, run
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.inference import make_inference
from dinov3.hub.architectures import PUBLISHED as ARCHITECTURES
from dinov3.hub.architectures import PublishedViT
from dinov3.hub.segmentors import dinov3_vit7b16_ms
from dinov3.utils.weight_files import WeightsError
from tests.eval.dense import scenes
from tests.heads.tiny import randomise_

CONFIG = "config=dinov3/eval/segmentation/configs/config-ade20k-m2f-inference.yaml"
SMALL = ("decoder_head.num_classes=2", "decoder_head.hidden_dim=32")
SIZES = ("transforms.eval.img_size=50", "eval.crop_size=40", "eval.stride=24", "num_workers=0")


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A small released model, and the arguments that name its weights."""
    hashes = {"LVD1689M": "a955f4ea", "SAT493M": "a6675841"}
    small = PublishedViT(32, 4, 1, 2, "swiglu64", hashes, untied=frozenset(hashes))
    monkeypatch.setitem(ARCHITECTURES, "dinov3_vit7b16", small)
    torch.manual_seed(0)
    model = dinov3_vit7b16_ms(pretrained=False, num_classes=2, hidden_dim=32)
    randomise_(model)
    backbone = model.segmentation_model[0].backbone.state_dict()
    torch.save(backbone, tmp_path / "backbone.pth")
    head = {name: entry for name, entry in model.state_dict().items() if ".backbone." not in name}
    torch.save(head, tmp_path / "head.pth")
    scenes.write_ade20k(tmp_path / "ade20k", n_val=2)
    return [
        "load_from=dinov3_vit7b16_ms",
        f"datasets.root={tmp_path / 'ade20k'}",
        f"head_weights={tmp_path / 'head.pth'}",
        f"backbone_weights={tmp_path / 'backbone.pth'}",
    ]


def results_of(output_dir: Path) -> dict[str, float]:
    with (output_dir / "results-semantic-segmentation.csv").open() as file:
        (row,) = csv.DictReader(file)
    return {name: float(value) for name, value in row.items() if value}


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_the_released_model_is_evaluated_from_local_files(released: list[str], tmp_path: Path, mode: str) -> None:
    more = ("eval.use_tta=false", f"eval.mode={mode}", "save_predictions=true", f"output_dir={tmp_path / 'out'}")
    assert run.main([CONFIG, *released, *SMALL, *SIZES, *more]) == 0
    results = results_of(tmp_path / "out")
    assert 0 <= results["mIoU"] <= 100
    record = json.loads((tmp_path / "out" / "results-semantic-segmentation.json").read_text())
    assert record["model"] == f"dinov3_vit7b16_ms with {tmp_path / 'head.pth'}"
    written = read_config(tmp_path / "out" / run.CONFIG_FILENAME, SegmentationConfig)
    assert written.decoder_head.type == "m2f" and written.head_weights == str(tmp_path / "head.pth")
    # The figures are those of the maps that were written.
    names = sorted((tmp_path / "ade20k/annotations/validation").iterdir())
    labels = np.stack([np.asarray(Image.open(name)) for name in names])
    maps = np.stack([np.asarray(Image.open(tmp_path / f"out/predictions/{i:06d}.png")) for i in range(2)])
    valid = labels > 0
    accuracy = 100 * (maps == labels)[valid].mean()
    assert results["aAcc"] == pytest.approx(accuracy, abs=0.01)


def test_sizes_and_flips_can_be_averaged(released: list[str], tmp_path: Path) -> None:
    more = ("transforms.eval.tta_ratios=[0.9]", "eval.mode=whole", f"output_dir={tmp_path / 'out'}")
    run.main([CONFIG, *released, *SMALL, *SIZES, *more])
    assert results_of(tmp_path / "out")["aAcc"] > 0


def test_a_head_of_another_size_is_refused(released: list[str], tmp_path: Path) -> None:
    given = [CONFIG, *released, *SIZES, f"output_dir={tmp_path / 'out'}", "decoder_head.num_classes=3"]
    message = "head.pth does not fit .*: expected a Mask2Former head of width {} and 3 classes .*, found a .* 32 and 2"
    with pytest.raises(WeightsError, match=message.format(64)):
        run.main([*given, "decoder_head.hidden_dim=64"])
    with pytest.raises(WeightsError, match=message.format(32)):
        run.main([*given, "decoder_head.hidden_dim=32"])


def test_a_trained_head_is_read_from_its_file(released: list[str], tmp_path: Path) -> None:
    # The same weights, as a training saves them, on a backbone that `model` describes.
    scenes.write_run(tmp_path)
    with torch.device("cpu"):
        config = read_segmentation(tmp_path, f"load_from={tmp_path / 'trained.pth'}")
        backbone = run._load_backbone(config)
        torch.manual_seed(0)
        model = run.build_model(backbone.model, config)
        randomise_(model.segmentation_model[1])
        head = {name: entry for name, entry in model.state_dict().items() if ".backbone." not in name}
    torch.save({"model": head, "iteration": 3}, tmp_path / "trained.pth")
    loaded, _ = run.load_segmentor(config)
    assert all(torch.equal(entry, loaded.state_dict()[name]) for name, entry in model.state_dict().items())
    assert not any(module.training for module in loaded.modules())
    # The backbone in a whole model is left out.
    whole = {name: entry + 1 if ".backbone." in name else entry for name, entry in model.state_dict().items()}
    torch.save(whole, tmp_path / "trained.pth")
    loaded, _ = run.load_segmentor(config)
    assert all(torch.equal(entry, loaded.state_dict()[name]) for name, entry in model.state_dict().items())
    torch.save({"model": {**head, "segmentation_model.0.extra": torch.zeros(1)}}, tmp_path / "trained.pth")
    with pytest.raises(WeightsError, match=r"does not fit this segmentation head: .*1 unknown \(0.extra\)"):
        run.load_segmentor(config)


def read_segmentation(directory: Path, *more: str) -> SegmentationConfig:
    backbone = (f"model.config_file={directory / 'config.yaml'}",)
    weights = (f"model.pretrained_weights={directory / 'teacher_checkpoint.pth'}",)
    return parse_arguments([CONFIG, "datasets.root=.", *SMALL, *backbone, *weights, *more], SegmentationConfig)


def test_photos_are_segmented_by_the_released_model(
    released: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "RELEASED_CONFIG", write_small_config(tmp_path / "small.yaml"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.txt").write_text("of something else\n")
    scenes.scene(7)[0].resize((70, 45)).save(tmp_path / "photo.png")
    Image.new("RGB", (5, 7)).save(tmp_path / "stamp.png")  # smaller than a patch
    head, backbone = (token.partition("=")[2] for token in released[2:])
    given = ["--model", "dinov3_vit7b16_ms", "--weights", head, "--backbone-weights", backbone, "--out", "out"]
    for name, size in {"photo": (45, 70), "stamp": (7, 5)}.items():
        predict.main(["--images", f"{name}.png", *given])
        labels = np.asarray(Image.open(tmp_path / "out" / f"{name}_labels.png"))
        assert labels.shape == size and set(np.unique(labels)) <= {0, 1}
        assert (tmp_path / "out" / f"{name}_segmentation.png").is_file()
    predictor = predict.load_segmentation_predictor(head, model="dinov3_vit7b16_ms", backbone_weights=backbone)
    assert predictor.class_names == ["class 0", "class 1"]
    with pytest.raises(ValueError, match="no model: give --weights of a trained head, or --model dinov3_vit7b16_ms"):
        predict.main(["--images", "photo.png", "--out", "other"])


def write_small_config(path: Path) -> Path:
    sizes = "transforms: {eval: {img_size: 48}}\neval: {crop_size: 40, stride: 24}\n"
    path.write_text(f"decoder_head: {{type: m2f, num_classes: 2, hidden_dim: 32}}\n{sizes}")
    return path


def test_images_of_one_batch_are_segmented_as_alone(released: list[str]) -> None:
    head, backbone = (token.partition("=")[2] for token in released[2:])
    options: dict[str, Any] = {"num_classes": 2, "hidden_dim": 32, "autocast_dtype": torch.float32}
    model = dinov3_vit7b16_ms(weights=head, backbone_weights=backbone, **options)
    images = torch.randn(2, 3, 50, 61, generator=torch.Generator().manual_seed(0))

    def infer(x: torch.Tensor) -> torch.Tensor:
        return make_inference(x, model, "slide", "m2f", (50, 61), 2, (40, 40), (24, 24), max_windows_per_batch=3)

    alone = torch.cat([infer(image[None]) for image in images])
    torch.testing.assert_close(infer(images), alone, rtol=1e-4, atol=1e-4)
