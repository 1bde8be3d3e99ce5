"""Open-vocabulary segmentation from the command line, against a computation of its own."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import Tensor

from dinov3.eval.report import collect, format_table
from dinov3.eval.text import open_vocabulary
from dinov3.eval.text.config import OPEN_VOCABULARY_RESULTS_FILENAME, TextModelConfig
from dinov3.eval.text.model import TextModel, load_text_model
from dinov3.utils.pixel_statistics import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tests.eval.dense import scenes
from tests.hub.small_dinotxt import make_published_dinotxt_small, write_dinotxt

SHORT_SIDE, CROP, STRIDE = 40, 32, 16
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    make_published_dinotxt_small(monkeypatch)
    return write_dinotxt(tmp_path)


@pytest.fixture
def run(weights: dict[str, Any], tmp_path: Path) -> Run:
    (tmp_path / "templates.txt").write_text("a photo of {}.\n")

    def run_on(dataset: str, *more: str) -> dict[str, Any]:
        arguments = (
            f"model.weights={weights['head']}",
            f"model.backbone_weights={weights['backbone']}",
            f"prompts.templates={tmp_path / 'templates.txt'}",
            f"eval.test_dataset={dataset}",
            "eval.num_workers=0",
            f"eval.short_side={SHORT_SIDE}",
            f"eval.crop_size={CROP}",
            f"eval.stride={STRIDE}",
            f"output_dir={tmp_path / 'out'}",
        )
        assert open_vocabulary.main([*arguments, *more]) == 0
        path = tmp_path / "out" / OPEN_VOCABULARY_RESULTS_FILENAME
        (row,) = csv.DictReader(path.open())
        return {"row": {name: float(value or "nan") for name, value in row.items()}} | json.loads(
            path.with_suffix(".json").read_text()
        )

    return run_on


@torch.no_grad()
def segment(model: TextModel, path: Path, names: list[str], mode: str) -> np.ndarray[Any, Any]:
    """Follow the published protocol step by step; returns [height, width]."""
    texts = model.model.encode_text(model.tokenizer.tokenize([f"a photo of {name}." for name in names]))
    texts = F.normalize(texts[:, texts.shape[1] // 2 :], dim=-1)
    photo = Image.open(path)
    width, height = photo.size
    size = (
        (SHORT_SIDE, int(SHORT_SIDE * height / width))
        if width < height
        else (
            int(SHORT_SIDE * width / height),
            SHORT_SIDE,
        )
    )
    pixels = torch.from_numpy(np.array(photo.resize(size, Image.Resampling.BICUBIC))) / 255
    image = ((pixels - torch.tensor(IMAGENET_DEFAULT_MEAN)) / torch.tensor(IMAGENET_DEFAULT_STD)).permute(2, 0, 1)[None]

    def cosines(part: Tensor) -> Tensor:
        grid = [-(-side // 16) for side in part.shape[-2:]]
        part = F.interpolate(part, [16 * side for side in grid], mode="bicubic", align_corners=False)
        _, patches, _ = model.model.visual_model.get_class_and_patch_tokens(part)
        return (F.normalize(patches, dim=-1) @ texts.mT).mT.unflatten(2, grid)

    def enlarge(maps: Tensor, to: tuple[int, int]) -> Tensor:
        return F.interpolate(maps, to, mode="bilinear", align_corners=False)

    if mode == "whole":
        return enlarge(cosines(image), (height, width))[0].argmax(dim=0).numpy()
    sums = torch.zeros(1, len(names), *image.shape[-2:])
    counts = torch.zeros(image.shape[-2:])
    for top in (0, 8):  # of 40 rows
        for left in (0, 16, 21):  # of 53 columns
            window = (..., slice(top, top + CROP), slice(left, left + CROP))
            sums[window] += enlarge(cosines(image[window]), (CROP, CROP)).softmax(dim=1)
            counts[window] += 1
    return enlarge(sums / counts, (height, width))[0].argmax(dim=0).numpy()


@pytest.mark.parametrize("mode", ["slide", "whole"])
@pytest.mark.parametrize("kind", ["folder", "ade20k"])
def test_the_miou_is_that_of_the_protocol(
    mode: str, kind: str, run: Run, weights: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    more = []
    if kind == "folder":
        scenes.write_segmentation_folder(root)
        dataset, names = f"SegmentationFolder:split=val:root={root}", ["wall", "box"]
        pairs = [(root / f"images/val/{n}.png", root / f"labels/val/{n}.png") for n in range(100, 103)]
    else:
        scenes.write_ade20k(root)
        dataset, names = f"ADE20K:split=VAL:root={root}", ["wall", "a red box", "sky"]
        (tmp_path / "names.txt").write_text("wall\na red box\nsky\n")
        more = [f"prompts.classes={tmp_path / 'names.txt'}"]
        pairs = [
            (root / f"images/validation/{n}.png", root / f"annotations/validation/{n}.png") for n in range(100, 103)
        ]
    results = run(dataset, f"eval.mode={mode}", "eval.save_predictions=true", *more)
    model = load_text_model(TextModelConfig(str(weights["head"]), str(weights["backbone"])))
    expected = np.concatenate([segment(model, image, names, mode).ravel() for image, _ in pairs])
    written = [np.asarray(Image.open(tmp_path / f"out/predictions/00000{n}.png")) for n in range(3)]
    predicted = np.concatenate([one.ravel() for one in written]).astype(int) - (kind == "ade20k")
    # Where two classes are equally near, either may win.
    assert (predicted != expected).mean() < 2e-3 and len(set(expected)) > 1
    labels = np.concatenate([np.asarray(Image.open(label)).ravel() for _, label in pairs]).astype(int)
    if kind == "ade20k":
        predicted, labels = predicted[labels > 0], labels[labels > 0] - 1
    present = sorted({*predicted, *labels})
    ious = 100 * jaccard_score(labels, predicted, labels=present, average=None)
    assert results["row"]["mIoU"] == pytest.approx(ious.mean(), abs=0.005)
    by_class = {entry["class"]: entry["IoU"] for entry in results["per_class"]}
    assert [by_class[names[index]] for index in present] == pytest.approx(list(ious), abs=0.005)
    assert all(by_class[name] is None for index, name in enumerate(names) if index not in present)
    assert results["reduce_zero_label"] == (kind == "ade20k")
    assert "open-vocabulary segmentation of 3 images" in capsys.readouterr().out
    table = format_table(collect([tmp_path / "out"]))
    assert "open vocabulary, mIoU" in table and f"{results['row']['mIoU']:.2f}" in table


def test_half_precision_and_predictions(run: Run, tmp_path: Path) -> None:
    dataset = f"SegmentationFolder:split=val:root={scenes.write_segmentation_folder(tmp_path / 'data')}"
    full = run(dataset)["row"]["aAcc"]
    assert run(dataset, "model.dtype=BFLOAT16", "eval.save_predictions=true")["row"]["aAcc"] == pytest.approx(
        full, abs=9
    )
    assert np.asarray(Image.open(tmp_path / "out" / "predictions" / "000000.png")).shape == (48, 64)


def test_names_and_labels_that_do_not_fit_are_refused(run: Run, tmp_path: Path) -> None:
    folder = f"SegmentationFolder:split=val:root={scenes.write_segmentation_folder(tmp_path / 'folder')}"
    ade = f"ADE20K:split=VAL:root={scenes.write_ade20k(tmp_path / 'ade')}"
    (tmp_path / "names.txt").write_text("wall\n")
    names = f"prompts.classes={tmp_path / 'names.txt'}"
    with pytest.raises(ValueError, match=r"has 1 names \(wall\), but the data set has 2 classes"):
        run(folder, names)
    with pytest.raises(ValueError, match="ADE20K does not know the names of its classes: give prompts.classes=FILE"):
        run(ade)
    with pytest.raises(ValueError, match="labels 2: for 1 classes expected 1 to 1, .* or the number of classes"):
        run(ade, names)
    with pytest.raises(ValueError, match="eval.test_dataset=ImageFolder:root=x: ImageFolder has no label maps"):
        run("ImageFolder:root=x")
    with pytest.raises(ValueError, match="eval.stride=64 must be at most eval.crop_size=32"):
        run(folder, "eval.stride=64")
