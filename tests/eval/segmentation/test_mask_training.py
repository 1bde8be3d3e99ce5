"""Training a small Mask2Former head on scenes, from the command line."""

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

from dinov3.eval.command.command_line import run_evaluation
from dinov3.eval.command.config import parse_arguments
from dinov3.eval.segmentation import predict, run
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.mask_training import AdapterAndHead, pad_to_multiple
from dinov3.eval.segmentation.train import build_model, trained_part
from dinov3.eval.training.checkpoints import load_checkpoint
from tests.eval.dense import scenes
from tests.eval.segmentation import photos
from tests.multiprocess import run_ranks

CONFIG = "config=dinov3/eval/segmentation/configs/config-m2f-small.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = scenes.write_segmentation_folder(tmp_path_factory.mktemp("folder"))
    scenes.write_backbone(root / "backbone.yaml")
    return root


def arguments(root: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        CONFIG,
        f"datasets.root={root}",
        f"model.config_file={root / 'backbone.yaml'}",
        f"output_dir={output_dir}",
        "num_workers=0",
        "bs=2",
        "decoder_head.num_classes=2",
        "decoder_head.hidden_dim=32",
        "decoder_head.ffn_dim=32",
        "decoder_head.n_queries=5",
        "decoder_head.n_encoder_layers=1",
        "decoder_head.n_decoder_layers=2",
        "train.n_points=64",
        "scheduler.total_iter=3",
        "scheduler.constructor_kwargs.warmup_iters=1",
        "eval.crop_size=40",
        "eval.stride=24",
        "eval.eval_interval=2",
        "transforms.train.img_size=48",
        "transforms.train.crop_size=[40,48]",  # sides that are not multiples of 32
        "transforms.eval.img_size=48",
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


def head_of(directory: Path) -> dict[str, Any]:
    return load_checkpoint(directory / "model_final.pth")[0]["model"]


def test_checkpoints_hold_adapter_and_head_under_their_published_names(trained: Path) -> None:
    names = set(head_of(trained))
    assert {name.split(".")[1] for name in names} == {"0", "1"} and not any("backbone" in name for name in names)
    assert {"segmentation_model.0.level_embed", "segmentation_model.1.predictor.query_feat.weight"} <= names


def test_a_trained_head_evaluates_to_the_figures_of_its_training(root: Path, trained: Path, tmp_path: Path) -> None:
    run.main(arguments(root, tmp_path, f"load_from={trained / 'best.pth'}"))
    assert results_of(tmp_path) == results_of(trained)


def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(
    root: Path, trained: Path, tmp_path: Path
) -> None:
    shutil.copy(trained / "model_00000002.pth", tmp_path)
    run.main(arguments(root, tmp_path))
    one, other = head_of(trained), head_of(tmp_path)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results_of(tmp_path) == results_of(trained)


def test_training_learns_the_scenes(root: Path, tmp_path: Path) -> None:
    more = ("scheduler.total_iter=25", "optimizer.lr=0.003", "eval.eval_interval=100", "decoder_head.drop_path=0")
    run.main(arguments(root, tmp_path, *more))
    assert results_of(tmp_path)["mIoU"] > 70


def test_the_backbone_stays_frozen_and_in_evaluation_mode(root: Path, tmp_path: Path) -> None:
    config = parse_arguments(arguments(root, tmp_path), SegmentationConfig)
    model = build_model(run._load_backbone(config).model, config)
    head = trained_part(model).train()
    assert isinstance(head, AdapterAndHead)
    backbone: Any = head[0].backbone
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert head[0].spm.training and head[1].training  # type: ignore[union-attr]


def test_padding_does_not_count() -> None:
    images, labels = pad_to_multiple(torch.ones(1, 3, 33, 64), torch.ones(1, 1, 33, 64, dtype=torch.uint8), 32)
    assert images.shape == (1, 3, 64, 64) and images[..., 33:, :].eq(0).all() and images[..., :33, :].eq(1).all()
    assert labels[..., 33:, :].eq(255).all() and labels[..., :33, :].eq(1).all()


def test_a_convnext_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "convnext.yaml").write_text("student:\n  arch: convnext_tiny\n")
    with pytest.raises(ValueError, match="a ViT-Adapter needs a ViT"):
        run.main(arguments(root, tmp_path, f"model.config_file={tmp_path / 'convnext.yaml'}"))


def run_in_ranks(rank: int, world_size: int, root: Path, output_dir: Path) -> dict[str, Any]:
    # What the adapter drops is drawn by each process on its own; points depend on the image.
    more = (f"bs={2 // world_size}", "decoder_head.drop_path=0", "scheduler.total_iter=2")
    config = parse_arguments(arguments(root, output_dir, *more), SegmentationConfig)
    return run_evaluation(config, evaluate=run.evaluate_segmentation, results_file=run.RESULTS_FILENAME)


@pytest.mark.distributed
def test_two_processes_train_as_one_does(root: Path, tmp_path: Path) -> None:
    run_in_ranks(0, 1, root, tmp_path / "one")
    run_ranks(run_in_ranks, 2, root, tmp_path / "two")
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / d / "training_metrics.json").read_text().splitlines()[:1]]
        for d in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_objects_are_learnt_and_measured_and_the_files_give_the_same_figures(root: Path, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    shutil.copytree(root, tmp_path / "data")
    for path in (tmp_path / "data/labels").rglob("*.png"):
        numbers = np.asarray(Image.open(path)).astype(np.uint16)  # the box is object 1, the wall is in none
        target = tmp_path / "data/instances" / path.relative_to(tmp_path / "data/labels")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers).save(target)
    folder = "SegmentationFolder:instances=instances:split="
    more = (
        "eval.tasks=[semantic,instance,panoptic]",
        "eval.stuff=[wall]",
        "metric_to_save=PQ",
        "save_predictions=true",
    )
    out = tmp_path / "out"
    data = (f"datasets.train={folder}train", f"datasets.val={folder}val")
    run.main(arguments(tmp_path / "data", out, *data, *more))
    results = results_of(out)
    assert {"mIoU", "AP", "AP50", "PQ", "SQ", "RQ"} <= set(results)
    truth = coco.COCO(str(out / "predictions/instances_truth.json"))
    evaluation = pytest.importorskip("pycocotools.cocoeval").COCOeval(
        truth, truth.loadRes(str(out / "predictions/instances.json")), "segm"
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert results["AP50"] == pytest.approx(100 * evaluation.stats[1], abs=0.01)
    ids = np.asarray(Image.open(out / "predictions/000000_panoptic.png"))
    segments = json.loads((out / "predictions/000000_panoptic.json").read_text())
    assert ids.shape == (scenes.HEIGHT, scenes.WIDTH) and set(np.unique(ids)) - {0} <= {one["id"] for one in segments}


@pytest.mark.parametrize(
    "more, match",
    [
        (["eval.tasks=[semantic,instance]"], "does not tell objects apart"),
        (["eval.tasks=[semantic,panoptik]"], "did you mean 'panoptic'"),
        (["eval.tasks=[instance]"], "semantic is always measured"),
        (["metric_to_save=PQ"], "metric_to_save=PQ is not a metric of eval.tasks"),
        (["decoder_head.type=linear", "eval.tasks=[semantic,instance]"], "need decoder_head.type=m2f"),
    ],
)
def test_tasks_that_cannot_be_measured_are_refused(more: list[str], match: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        run.main(arguments(root, tmp_path, *more))


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_objects_of_photos_are_written_and_drawn(task: str, root: Path, trained: Path, tmp_path: Path) -> None:
    Image.new("RGB", (70, 45), "gray").save(tmp_path / "photo.png")
    given = ["--images", f"{tmp_path / 'photo.png'}", "--weights", str(trained), "--out", str(tmp_path / "out")]
    predict.main([*given, "--task", task, "--min-score", "0"])
    ids = np.asarray(Image.open(tmp_path / f"out/photo_{task}.png"))
    objects = json.loads((tmp_path / f"out/photo_{task}.json").read_text())
    assert ids.shape == (45, 70)
    assert [one["id"] for one in objects] == [number for number in np.unique(ids).tolist() if number]
    assert all(one["name"] in ("wall", "box") and one["area"] == (ids == one["id"]).sum() for one in objects)
    assert Image.open(tmp_path / f"out/photo_{task}_view.png").size == (350, 225)


def test_objects_of_real_photos_are_trained_on_and_measured(root: Path, tmp_path: Path) -> None:
    # Two steps learn nothing; that training learns, the scenes show in less time.
    source = Path(str(pytest.importorskip("skimage.data").__file__)).parent
    photos.write_photos(tmp_path / "photos", source, side=96)
    folder = f"SegmentationFolder:root={tmp_path / 'photos'}:instances=instances:split=train"
    more = ("scheduler.total_iter=2", "decoder_head.num_classes=5", "save_predictions=true")
    tasks = ("eval.tasks=[semantic,instance,panoptic]", "eval.stuff=[background]")
    out = tmp_path / "out"
    run.main(arguments(root, out, f"datasets.train={folder}", f"datasets.val={folder}", *more, *tasks))
    assert {"mIoU", "AP", "AP50", "PQ"} <= set(results_of(out))
    truth = json.loads((out / "predictions/instances_truth.json").read_text())
    names = [one["name"] for one in truth["categories"]]
    found = [names[one["category_id"] - 1] for one in truth["annotations"]]
    assert sorted(found) == sorted(name for objects in photos.OUTLINES.values() for name, _ in objects)
