"""Segmentation from the command line to files, on an ADE20K of four images."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.configs import ConfigError
from dinov3.eval.command.command_line import run_evaluation
from dinov3.eval.command.config import parse_arguments
from dinov3.eval.segmentation import run
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.metrics import SEGMENTATION_METRICS
from dinov3.eval.training.checkpoints import load_checkpoint
from dinov3.utils.weight_files import WeightsError
from tests.eval.dense import scenes
from tests.multiprocess import run_ranks

CONFIG = "config=dinov3/eval/segmentation/configs/config-ade20k-linear-training.yaml"
FOLDER = (
    "datasets.train=SegmentationFolder:split=train",
    "datasets.val=SegmentationFolder:split=val",
    "eval.reduce_zero_label=false",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = scenes.write_ade20k(tmp_path_factory.mktemp("ade20k"))
    scenes.write_backbone(root / "backbone.yaml")
    scenes.write_segmentation_folder(root / "folder")
    return root


def arguments(root: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        CONFIG,
        f"datasets.root={root}",
        f"model.config_file={root / 'backbone.yaml'}",
        f"output_dir={output_dir}",
        "num_workers=0",
        "decoder_head.num_classes=2",
        "scheduler.total_iter=3",
        "scheduler.constructor_kwargs.warmup_iters=1",
        "eval.crop_size=32",
        "eval.stride=24",
        "eval.eval_interval=2",
        "transforms.train.img_size=48",
        "transforms.eval.img_size=48",
        "transforms.train.crop_size=[32,48]",
        *more,
    ]


def results_of(output_dir: Path) -> dict[str, float]:
    with (output_dir / "results-semantic-segmentation.csv").open() as file:
        (row,) = csv.DictReader(file)
    return {name: float(value) for name, value in row.items() if value}


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("trained")
    assert run.main(arguments(root, output_dir)) == 0
    return output_dir


def test_a_run_leaves_its_files(trained: Path) -> None:
    files = {path.name for path in trained.iterdir()}
    assert {"segmentation_config.yaml", "results-semantic-segmentation.json", "best.pth", "model_final.pth"} <= files
    assert set(results_of(trained)) <= set(SEGMENTATION_METRICS)
    entries = load_checkpoint(trained / "model_final.pth")[0]["model"]
    assert set(entries) == {
        *(f"segmentation_model.1.conv.{name}" for name in ("weight", "bias")),
        *(f"segmentation_model.1.batchnorm_layer.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
        "segmentation_model.1.batchnorm_layer.num_batches_tracked",
    }


def test_a_trained_head_evaluates_to_the_figures_of_its_training(root: Path, trained: Path, tmp_path: Path) -> None:
    run.main(arguments(root, tmp_path, f"load_from={trained / 'best.pth'}"))
    assert results_of(tmp_path) == results_of(trained)


def test_training_learns_the_scenes(root: Path, tmp_path: Path) -> None:
    more = ("scheduler.total_iter=40", "optimizer.lr=0.02", "eval.eval_interval=100", "train.diceloss_weight=0.5")
    run.main(arguments(root, tmp_path, *more))
    assert results_of(tmp_path)["mIoU"] > 60


def test_the_end_of_a_training_is_validated_once(trained: Path) -> None:
    records = [json.loads(line) for line in (trained / "training_metrics.json").read_text().splitlines()]
    assert [record["iteration"] for record in records if "validation" in record] == [2, 3]


def test_results_are_those_of_the_best_head(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([50.0, 80.0, 60.0])
    monkeypatch.setattr(
        "dinov3.eval.segmentation.train.evaluate_segmentation_with_config",
        lambda *_, **__: dict.fromkeys(SEGMENTATION_METRICS, next(scores)),
    )
    drawn: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(
        run, "evaluate_segmentation_with_config", lambda _, model, *__, **___: drawn.append(model.state_dict())
    )
    run.main(arguments(root, tmp_path, "eval.eval_interval=1", "save_predictions=true"))
    assert results_of(tmp_path)["mIoU"] == 80
    best = load_checkpoint(tmp_path / "best.pth")
    assert best[1] == 2 and best[0]["result"]["best_metrics"]["mIoU"] == 80
    assert load_checkpoint(tmp_path / "model_final.pth")[1] == 3
    assert all(torch.equal(drawn[0][name], entry) for name, entry in best[0]["model"].items())


def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(
    root: Path, trained: Path, tmp_path: Path
) -> None:
    shutil.copy(trained / "model_00000002.pth", tmp_path)
    run.main(arguments(root, tmp_path))
    one, other = (load_checkpoint(d / "model_final.pth")[0]["model"] for d in (trained, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results_of(tmp_path) == results_of(trained)


def test_a_batch_of_one_trains_and_class_names_of_a_folder_are_kept(root: Path, tmp_path: Path) -> None:
    run.main(arguments(root, tmp_path, f"datasets.root={root / 'folder'}", *FOLDER, "bs=1"))
    assert results_of(tmp_path) and (tmp_path / "classes.txt").read_text() == "wall\nbox\n"


def test_predictions_are_saved_as_the_labels_of_the_dataset(root: Path, trained: Path, tmp_path: Path) -> None:
    run.main(arguments(root, tmp_path, f"load_from={trained / 'model_final.pth'}", "save_predictions=true"))
    masks = [np.asarray(Image.open(tmp_path / "predictions" / f"{number:06d}.png")) for number in range(3)]
    assert all(mask.shape == (scenes.HEIGHT, scenes.WIDTH) and set(np.unique(mask)) <= {1, 2} for mask in masks)
    assert (tmp_path / "predictions" / "000000_picture.png").is_file()


def test_sizes_and_flips_and_metrics_of_images_can_be_averaged(root: Path, trained: Path, tmp_path: Path) -> None:
    more = ("eval.use_tta=true", "transforms.eval.tta_ratios=[1.0,1.5]", "eval.compute_metric_per_image=true")
    run.main(arguments(root, tmp_path, f"load_from={trained / 'model_final.pth'}", *more))
    assert results_of(tmp_path)["aAcc"] > 0 and results_of(tmp_path).keys() == results_of(trained).keys()


def test_images_without_a_labelled_pixel_are_an_error_only_if_all_are(
    root: Path, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(root, tmp_path / "some")
    ignored = Image.fromarray(np.zeros((scenes.HEIGHT, scenes.WIDTH), np.uint8))
    ignored.save(tmp_path / "some/annotations/validation/100.png")
    load_from = f"load_from={trained / 'model_final.pth'}"
    run.main(arguments(root, tmp_path / "out", load_from, f"datasets.root={tmp_path / 'some'}"))
    for number in (101, 102):
        ignored.save(tmp_path / f"some/annotations/validation/{number}.png")
    with pytest.raises(ValueError, match="none of 3 images has a labelled pixel"):
        run.main(arguments(root, tmp_path / "out", load_from, f"datasets.root={tmp_path / 'some'}"))


def test_labels_out_of_range_stop_a_training(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    for number in range(4):
        labels = Image.fromarray(np.full((scenes.HEIGHT, scenes.WIDTH), 9, np.uint8))
        labels.save(tmp_path / f"data/annotations/training/{number}.png")
    # 9, of which 0 is nothing.
    with pytest.raises(
        ValueError, match=r"step 0, images images/training/\d.png, images/training/\d.png: labels 8 for 2 classes"
    ):
        run.main(arguments(root, tmp_path / "out", f"datasets.root={tmp_path / 'data'}"))


BAD_SETTINGS: dict[str, tuple[list[str], type[Exception], str]] = {
    "typo": (["eval.strid=8"], ConfigError, "eval.stride"),
    "one block": (["decoder_head.type=m2f"], ValueError, "backbone_out_layers=LAST: .* four blocks; give FOUR_EVEN"),
    "unknown head": (["decoder_head.type=linaer"], ValueError, "linaer"),
    "released": (["load_from=dinov3_vit7b16_ms"], ValueError, "dinov3_vit7b16_ms has a Mask2Former head: give .*=m2f"),
    "weights of nothing": (
        ["head_weights=a.pth"],
        ValueError,
        "head_weights and backbone_weights go with load_from=dino",
    ),
    "no loss": (["train.celoss_weight=0"], ValueError, "weight"),
    "no training images": (["datasets.train=''"], ValueError, "datasets.train"),
    "no root": (["datasets.root=/nowhere"], FileNotFoundError, "/nowhere"),
    "no head file": (["load_from=/nowhere/head.pth"], FileNotFoundError, "/nowhere/head.pth"),
    "no label maps": (["datasets.train=ImageFolder:root=ROOT"], ValueError, "ImageFolder has no label maps"),
    "classes": (["datasets.root=ROOT/folder", *FOLDER, "decoder_head.num_classes=5"], ValueError, "has 2 classes"),
    "zero": (["datasets.root=ROOT/folder", *FOLDER[:2]], ValueError, "eval.reduce_zero_label=false"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_refused(name: str, root: Path, tmp_path: Path) -> None:
    more, error, match = BAD_SETTINGS[name]
    with pytest.raises(error, match=match):
        run.main(arguments(root, tmp_path, *(token.replace("ROOT", str(root)) for token in more)))
    assert not list(tmp_path.glob("*.pth")) and not list(tmp_path.glob("results*"))


def test_another_head_is_refused(root: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="model_final.pth does not fit .*: expected a linear segmentation head with"):
        more = (f"load_from={trained / 'model_final.pth'}", "decoder_head.num_classes=3")
        run.main(arguments(root, tmp_path, *more))


def run_in_ranks(rank: int, world_size: int, root: Path, output_dir: Path) -> dict[str, Any]:
    # The same images per step, whatever the number of processes; what is dropped is drawn by each on its own.
    more = (f"bs={4 // world_size}", "optimizer.lr=0.01", "decoder_head.dropout=0", f"datasets.root={root / 'folder'}")
    config = parse_arguments(arguments(root, output_dir, *more, *FOLDER), SegmentationConfig)
    return run_evaluation(config, evaluate=run.evaluate_segmentation, results_file=run.RESULTS_FILENAME)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_train_and_measure_what_one_does(root: Path, tmp_path: Path) -> None:
    one = run_in_ranks(0, 1, root, tmp_path / "one")
    two = run_ranks(run_in_ranks, 2, root, tmp_path / "two")
    assert two[0] == two[1]
    assert two[0] == pytest.approx(one, abs=0.02, nan_ok=True)
    heads = [load_checkpoint(tmp_path / d / "model_final.pth")[0]["model"] for d in ("one", "two")]
    for name, entry in heads[0].items():
        torch.testing.assert_close(heads[1][name], entry, rtol=1e-3, atol=1e-5, msg=name)
    records = [json.loads((tmp_path / d / "results-semantic-segmentation.json").read_text()) for d in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]
