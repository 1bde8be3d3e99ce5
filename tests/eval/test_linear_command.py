"""Linear probing from the command line, on images of ImageNet's layouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3.eval import knn, linear
from dinov3.eval.classification.linear_config import LinearEvalConfig, OptimizerType
from dinov3.eval.classification.metrics import ClassificationMetricType
from dinov3.eval.command.config import args_dict_to_dataclass, cli_parser

N_CLASSES = 3


def write(path: Path, label: int, noise: int) -> None:
    rng = np.random.default_rng([label, noise])
    pixels = np.clip(80 * label + rng.integers(0, 60, (16, 16, 3)), 0, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folders of classes, validation images with lists of classes, and corrupted images."""
    for number in range(12):
        label = number % N_CLASSES
        write(tmp_path / "train" / f"n{label}" / f"{number}.JPEG", label, number)
        write(tmp_path / "val" / f"n{label}" / f"ILSVRC2012_val_{number + 1:08d}.JPEG", label, 100 + number)
        write(tmp_path / "c" / "fog" / str(number // 3 + 1) / f"n{label}" / f"{number}.png", label, 200 + number)
    (tmp_path / "real.json").write_text(json.dumps([[n % N_CLASSES, 0] for n in range(12)]))
    return tmp_path


def command(root: Path, *more: str) -> list[str]:
    return [
        "model.config_file=dinov3/configs/train/demo_cpu.yaml",
        f"train.dataset=ImageFolder:root={root}/train",
        *("transform.resize_size=16", "transform.crop_size=16", "train.batch_size=4", "train.epochs=2"),
        *("train.num_workers=0", "eval.num_workers=0"),
        *more,
    ]


def test_several_test_sets_with_their_own_metrics(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    val, real, corrupted = (
        f"ImageFolder:root={root}/val",
        f"ImageNetReaL:root={root}/val:labels={root}/real.json",
        f"ImageNetC:root={root}/c",
    )
    argv = command(
        root,
        f"train.val_dataset={val}",
        f"eval.test_datasets=[{real},{corrupted}]",
        "eval.test_metric_types=[ANY_MATCH_ACCURACY,imagenet_c_metric]",
        *("train.epoch_length=null", "train.learning_rates=[1e-3,0.1]", "--output-dir", f"{root}/out"),
    )
    assert linear.main(argv) == 0
    content = json.loads((root / "out" / "results-linear.json").read_text())
    results = content["results"]
    assert list(results) == [f"{corrupted}_accuracy", "best_classifier", f"{real}_accuracy", f"{val}_accuracy"]
    assert results[f"{real}_accuracy"] >= results[f"{val}_accuracy"]
    assert content["config"]["train"]["epoch_length"] is None
    assert [entry["images"] for entry in content["datasets"]["test"]] == [12, 12]
    assert f"{results[f'{val}_accuracy']:.2f}" in capsys.readouterr().out
    for name in ("eval_config.yaml", "results-linear.csv", "results_eval_linear.json"):
        assert (root / "out" / name).is_file()


def test_neighbours_with_lists_of_classes(root: Path) -> None:
    argv = command(
        root,
        f"eval.test_dataset=ImageNetReaL:root={root}/val:labels={root}/real.json",
        *("eval.test_metric_type=ANY_MATCH_ACCURACY", "train.ks=[1]", f"output_dir={root}/out"),
    )
    assert knn.main([token for token in argv if not token.startswith("train.epochs")]) == 0
    assert json.loads((root / "out" / "results-knn.json").read_text())["results"]["1 Top 1"] > 30


def test_grids_and_metrics_are_given_by_name_or_value() -> None:
    needed = ["model.dino_hub=dinov3_vits16", "train.dataset=A", "train.val_dataset=B"]
    tokens = ["eval.test_datasets=[C,D]", "eval.test_metric_types=[mean_per_class_accuracy,MEAN_ACCURACY]"]
    argv = [*needed, *tokens, "train.n_last_blocks_list=[1,4]", "train.optimizer_type=adamw"]
    config, _ = args_dict_to_dataclass(cli_parser(argv), LinearEvalConfig, save_config=False)
    assert config.eval.test_metric_types == [
        ClassificationMetricType.MEAN_PER_CLASS_ACCURACY,
        ClassificationMetricType.MEAN_ACCURACY,
    ]
    assert list(config.train.n_last_blocks_list) == [1, 4]
    assert config.train.optimizer_type is OptimizerType.ADAMW


@pytest.mark.parametrize(
    "token, message",
    [
        ("train.nope=1", r"unknown key 'train\.nope'"),
        ("train.learning_rates=0.1", r"train\.learning_rates"),
        ("eval.test_metric_types=[NOT_A_METRIC]", r"eval\.test_metric_types=NOT_A_METRIC"),
        ("train.loss_type=L2", r"train\.loss_type=L2"),
        ("train.val_dataset", r"missing: train\.val_dataset"),
    ],
)
def test_wrong_settings_name_their_key(token: str, message: str) -> None:
    argv = ["model.dino_hub=dinov3_vits16", "train.dataset=A", "train.val_dataset=B"]
    argv = [*argv, token] if "=" in token else argv[:-1]
    with pytest.raises(ValueError, match=message):
        args_dict_to_dataclass(cli_parser(argv), LinearEvalConfig, save_config=False)


def test_wrong_split_is_named_before_any_image_is_read(root: Path) -> None:
    argv = command(root, f"train.val_dataset=ImageFolder:split=NOPE:root={root}", f"output_dir={root}/out")
    with pytest.raises(FileNotFoundError, match="no directory .*NOPE; .*has .*train, val"):
        linear.main(argv)
