"""Depth from the command line to files, on a NYU of four images."""

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
from dinov3.eval.command.config import parse_arguments, read_config
from dinov3.eval.depth import run
from dinov3.eval.depth.config import DepthConfig
from dinov3.eval.training.checkpoints import load_checkpoint
from dinov3.hub import depthers
from dinov3.hub.transforms import normalization_of
from dinov3.utils.weight_files import WeightsError
from tests.eval.dense import scenes
from tests.heads.tiny import make_published_depthers_small
from tests.multiprocess import run_ranks

CONFIG = "config=dinov3/eval/depth/configs/config-nyu.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = scenes.write_nyu(tmp_path_factory.mktemp("nyu"))
    scenes.write_backbone(root / "backbone.yaml")
    scenes.write_depth_folder(root / "folder")
    return root


def arguments(root: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        CONFIG,
        f"datasets.root={root}",
        f"model.config_file={root / 'backbone.yaml'}",
        f"output_dir={output_dir}",
        "num_workers=0",
        "model_dtype=FLOAT32",
        "scheduler.total_iter=3",
        "scheduler.constructor_kwargs.warmup_iters=1",
        "eval.eval_interval=2",
        "transforms.train.random_crop=[32,48]",
        *more,
    ]


def results_of(output_dir: Path) -> dict[str, float]:
    with (output_dir / "results-depth.csv").open() as file:
        (row,) = csv.DictReader(file)
    return {name: float(value) for name, value in row.items()}


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("trained")
    assert run.main(arguments(root, output_dir)) == 0
    return output_dir


def test_a_run_leaves_its_files(trained: Path) -> None:
    files = {path.name for path in trained.iterdir()}
    assert {"depth_config.yaml", "results-depth.csv", "results-depth.json", "training_metrics.json"} <= files
    assert {"model_00000002.pth", "model_00000003.pth", "model_final.pth", "best.pth"} <= files
    assert list(results_of(trained)) == ["NYU_a1", "NYU_abs_rel", "NYU_rmse"]
    by_image = json.loads((trained / "NYU" / "results.json").read_text())
    assert by_image["index"] == [0, 1, 2]
    assert results_of(trained)["NYU_rmse"] == pytest.approx(np.mean(by_image["rmse"]))
    assert json.loads((trained / "results-depth.json").read_text())["datasets"]["test"]["images"] == 3


def test_training_learns_the_scenes(root: Path, tmp_path: Path) -> None:
    def train(n_steps: int) -> float:
        loss = "losses.SIGLOSS=0", "losses.L1=1"  # the published one has no variance in its first 100 steps
        steps = f"scheduler.total_iter={n_steps}", "scheduler.constructor_kwargs.warmup_iters=0", "optimizer.lr=0.01"
        given = arguments(root, tmp_path / str(n_steps), *loss, *steps, "eval.eval_interval=100", "metrics=[rmse]")
        return run.evaluate_depth(None, parse_arguments(given, DepthConfig)).metrics["NYU_rmse"]

    assert train(60) < 0.6 * train(1)


def test_a_trained_head_evaluates_to_the_figures_of_its_training(root: Path, trained: Path, tmp_path: Path) -> None:
    run.main(arguments(root, tmp_path, f"load_from={trained / 'model_final.pth'}"))
    assert results_of(tmp_path) == results_of(trained)


def test_a_bare_head_is_taken_too(root: Path, trained: Path, tmp_path: Path) -> None:
    torch.save(load_checkpoint(trained / "model_final.pth")[0]["model"], tmp_path / "bare.pth")
    run.main(arguments(root, tmp_path / "out", f"load_from={tmp_path / 'bare.pth'}"))
    assert results_of(tmp_path / "out") == results_of(trained)


def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(
    root: Path, trained: Path, tmp_path: Path
) -> None:
    shutil.copy(trained / "model_00000002.pth", tmp_path)
    run.main(arguments(root, tmp_path))
    one, other = (load_checkpoint(d / "model_final.pth")[0]["model"] for d in (trained, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results_of(tmp_path) == results_of(trained)


def test_a_finished_training_is_not_repeated(root: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    before = (tmp_path / "copy" / "training_metrics.json").read_text()
    run.main(arguments(root, tmp_path / "copy"))
    assert (tmp_path / "copy" / "training_metrics.json").read_text() == before


def test_another_training_is_not_continued(root: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"other settings \(optimizer.lr: 0.0003, now 0.001\)"):
        run.main(arguments(root, tmp_path / "copy", "optimizer.lr=0.001"))


def test_a_head_without_its_training_is_not_continued(root: Path, trained: Path, tmp_path: Path) -> None:
    torch.save(load_checkpoint(trained / "model_final.pth")[0]["model"], tmp_path / "model_final.pth")
    with pytest.raises(WeightsError, match="not the state of its training"):
        run.main(arguments(root, tmp_path))


def test_another_head_is_refused(root: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model_final.pth does not fit"):
        load_from = f"load_from={trained / 'model_final.pth'}"
        run.main(arguments(root, tmp_path, load_from, "decoder_head.use_cls_token=true"))


def test_predictions_are_saved(root: Path, trained: Path, tmp_path: Path) -> None:
    saving = ("result_config.save_results=true", "result_config.extension=PNG")
    run.main(arguments(root, tmp_path, f"load_from={trained / 'model_final.pth'}", *saving))
    files = sorted((tmp_path / "visualizations").iterdir())
    assert [file.name for file in files] == [f"results_{n}.png" for n in range(3)]
    assert Image.open(files[0]).size == (2 * scenes.WIDTH, scenes.HEIGHT)


def test_maps_without_a_pixel_that_counts_are_left_out(root: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "nyu")
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(tmp_path / "nyu/room/depth_100.png")
    load_from = f"load_from={trained / 'model_final.pth'}"
    run.main(arguments(tmp_path / "nyu", tmp_path / "out", load_from, f"datasets.root={tmp_path / 'nyu'}"))
    by_image = json.loads((tmp_path / "out" / "NYU" / "results.json").read_text())
    assert by_image["rmse"][0] is None and by_image["rmse"][1] is not None
    assert results_of(tmp_path / "out")["NYU_rmse"] == pytest.approx(np.mean(by_image["rmse"][1:]))


def test_a_set_without_any_pixel_that_counts_is_an_error(root: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of 3 depth maps has a pixel that counts"):
        run.main(arguments(root, tmp_path, f"load_from={trained / 'model_final.pth'}", "eval.max_depth=1.0"))


def test_training_on_maps_without_a_valid_pixel_leaves_finite_weights(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "nyu")
    for number in range(4):
        Image.fromarray(np.zeros((48, 64), np.uint16)).save(tmp_path / f"nyu/room/depth_{number}.png")
    run.main(arguments(root, tmp_path / "out", f"datasets.root={tmp_path / 'nyu'}"))
    head = load_checkpoint(tmp_path / "out" / "model_final.pth")[0]["model"]
    assert all(bool(entry.isfinite().all()) for entry in head.values())


def test_images_of_different_sizes_make_no_batch(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "nyu")
    scenes.scene(0, height=64)[0].save(tmp_path / "nyu/room/rgb_0.png")
    Image.fromarray(np.full((64, 64), 2000, np.uint16)).save(tmp_path / "nyu/room/depth_0.png")
    with pytest.raises(ValueError, match="images of a batch differ in size"):
        more = (f"datasets.root={tmp_path / 'nyu'}", "transforms.train.random_crop=null", "bs=4")
        run.main(arguments(root, tmp_path / "out", *more))


BAD_SETTINGS: dict[str, tuple[list[str], type[Exception], str]] = {
    "typo": (["decoder_head.max_dept=8"], ConfigError, "decoder_head.max_depth"),
    "metric": (["metrics=[rmsee]"], ValueError, "did you mean 'rmse'"),
    "no model": (["model=null"], ValueError, "no model"),
    "no losses": (["losses=null"], ValueError, "training needs losses"),
    "no root": (["datasets.root=/nowhere"], FileNotFoundError, "/nowhere"),
    "no head": (["load_from=/nowhere/head.pth"], FileNotFoundError, "/nowhere/head.pth"),
    "range": (["eval.min_depth=20"], ValueError, "eval.min_depth=20"),
    "head weights": (["head_weights=x.pth"], ValueError, "dinov3_vit7b16_dd"),
    "warm-up": (["scheduler.constructor_kwargs.warmup_iters=3"], ValueError, "warmup_iters=3"),
    "schedule": (["scheduler.type=StepLR"], ValueError, "StepLR needs step_size"),
    "head type": (["decoder_head.type=dtp"], ValueError, "did you mean 'dpt'"),
    "linear head": (
        ["decoder_head.head_kwargs.channels=8"],
        ValueError,
        "head_kwargs.channels: a linear head takes none",
    ),
    "DPT head": (
        ["decoder_head.type=dpt", "decoder_head.head_kwargs.chanels=8"],
        ValueError,
        "did you mean 'channels'",
    ),
    "size": (["transforms.eval.img_size=small"], ValueError, "transforms.eval.img_size='small'"),
    "sizes": (["transforms.train.img_size=[48,64,3]"], ValueError, r"transforms.train.img_size=\[48, 64, 3\]"),
    "crop": (["transforms.train.random_crop=[32]"], ValueError, r"transforms.train.random_crop=\[32\]"),
    "no crop": (["transforms.train.random_crop=[0,-8]"], ValueError, r"transforms.train.random_crop=\[0, -8\]"),
    "brightness": (["transforms.train.brightness_range=[1.2,0.8]"], ValueError, "transforms.train.brightness_range"),
    "channels": (["transforms.mean=[0.5]"], ValueError, r"transforms.mean=\[0.5\]"),
    "spread": (["transforms.std=[0.2,0.2,0]"], ValueError, "transforms.std"),
    "steps": (["scheduler.total_iter=0"], ValueError, "scheduler.total_iter=0"),
    "hub name": (["load_from=dinov3_vit7b16_d"], FileNotFoundError, "did you mean 'dinov3_vit7b16_dd'"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_refused(name: str, root: Path, tmp_path: Path) -> None:
    more, error, match = BAD_SETTINGS[name]
    given = [token for token in arguments(root, tmp_path) if not (name == "no model" and token.startswith("model."))]
    with pytest.raises(error, match=match):
        run.main([*given, *more])
    assert not list(tmp_path.glob("*.pth")) and not list(tmp_path.glob("results*"))


@pytest.mark.parametrize("entry", run.HUB_DEPTHERS)
def test_the_configuration_of_a_released_model_is_written(
    entry: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_published_depthers_small(monkeypatch)
    released = getattr(depthers, entry)(pretrained=False)
    for part, model in (("head", released.decoder), ("backbone", released.encoder.backbone)):
        torch.save(model.state_dict(), tmp_path / f"{part}.pth")
    weights = [f"{part}_weights={tmp_path / part}.pth" for part in ("head", "backbone")]
    sets = [f"datasets.root={root}", "datasets.test=NYU:split=VAL", "num_workers=0", "eval.max_depth=100"]
    run.main([f"load_from={entry}", f"output_dir={tmp_path}", *weights, *sets])
    written = read_config(tmp_path / run.CONFIG_FILENAME, DepthConfig)
    assert written.decoder_head == depthers.config_of(entry)
    mean, std = normalization_of(depthers.PUBLISHED[entry].weights)
    assert (written.transforms.mean, written.transforms.std) == (list(mean), list(std))
    assert json.loads((tmp_path / "results-depth.json").read_text())["config"]["decoder_head"]["type"] == "dpt"


def run_in_ranks(rank: int, world_size: int, root: Path, output_dir: Path) -> dict[str, Any]:
    # The same images per step, whatever the number of processes.
    folder = f"datasets.root={root / 'folder'}", "datasets.train=DepthFolder:split=train"
    sets = "datasets.val=DepthFolder:split=val", "datasets.test=DepthFolder:split=val"
    more = (f"bs={4 // world_size}", "global_loss=true", "optimizer.lr=0.01")
    config = parse_arguments(arguments(root, output_dir, *folder, *sets, *more), DepthConfig)
    return run.evaluate_depth(None, config).metrics


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_train_and_measure_what_one_does(root: Path, tmp_path: Path) -> None:
    one = run_in_ranks(0, 1, root, tmp_path / "one")
    two = run_ranks(run_in_ranks, 2, root, tmp_path / "two")
    assert two[0] == two[1]
    assert two[0] == pytest.approx(one, rel=1e-4)
    heads = [load_checkpoint(tmp_path / d / "model_final.pth")[0]["model"] for d in ("one", "two")]
    for name, entry in heads[0].items():
        torch.testing.assert_close(heads[1][name], entry, rtol=1e-3, atol=1e-5, msg=name)
    images = [json.loads((tmp_path / d / "DepthFolder" / "results.json").read_text()) for d in ("one", "two")]
    assert images[0]["index"] == images[1]["index"] == [0, 1, 2]
