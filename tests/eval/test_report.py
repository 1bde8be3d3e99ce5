"""One table and one chart of several evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3.eval import report
from dinov3.eval.command.results import write_results


def write(directory: Path, evaluation: str, results: dict[str, Any], model: str = "", **config: Any) -> None:
    write_results(
        results, directory, f"results-{evaluation}.csv", {"model": model, "config": config} if model else None
    )


DIGITS = {"test_dataset": "ImageFolder:root=/data/digits:split=test"}
FACES = {"test_dataset": "ImageFolder:root=/data/faces/test", "test_metric_type": "MEAN_PER_CLASS_ACCURACY"}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write(
        tmp_path / "small" / "knn",
        "knn",
        {"10 Top 1": 70.0, "10 Top 5": 90.0, "10 Top 1 std": 0.5},
        "ViT-S",
        eval=DIGITS,
    )
    val = "ImageFolder:root=/data/digits:split=test"
    write(tmp_path / "large", "knn", {"10 Top 1": 81.25, "20 Top 1": 82.5}, "ViT-L", eval=DIGITS)
    write(tmp_path / "large", "linear", {f"{val}_accuracy": 85.5, "best_classifier": "classifier_1"}, "ViT-L")
    write(tmp_path / "large", "log-regression", {"top-1_mean": 84.0, "top-1_std": 1.5, "top-5_mean": 99.0}, "ViT-L")
    return tmp_path


def test_table_has_the_main_metrics_of_all_runs(runs: Path) -> None:
    table = report.format_table(report.collect([runs / "small", runs / "large"]))
    assert table.splitlines() == [
        "| run | model | data/digits/test, 10-NN | data/digits/test, 20-NN | data/digits/test, linear "
        "| logistic regression |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| small/knn | ViT-S | 70.00 ± 0.50 | - | - | - |",
        "| large | ViT-L | **81.25** | **82.50** | **85.50** | **84.00** ± 1.50 |",
    ]


def test_rows_come_in_the_order_given_and_once(runs: Path) -> None:
    rows = report.collect([runs / "large", runs])
    assert [row.name for row in rows] == ["large", "small/knn"]


def test_names_are_as_long_as_needed(tmp_path: Path) -> None:
    for seed in (0, 1):
        write(tmp_path / f"seed{seed}" / "eval", "knn", {"10 Top 1": 1.5})
    assert [row.name for row in report.collect([tmp_path])] == ["seed0/eval", "seed1/eval"]
    assert [row.name for row in report.collect([tmp_path / "seed1"])] == ["eval"]


def test_neighbouring_directories_of_a_model_are_one_row(tmp_path: Path) -> None:
    for run in ("a", "b"):
        write(tmp_path / run / "knn", "knn", {"10 Top 1": 1.5}, f"/{run}/eval/training_7/teacher.pth", eval=DIGITS)
        write(tmp_path / run / "logreg", "log-regression", {"top-1": 2.5}, f"/{run}/eval/training_7/teacher.pth")
    write(tmp_path / "b" / "logreg-2", "log-regression", {"top-1": 3.5}, "/b/eval/training_7/teacher.pth")
    write(tmp_path / "b" / "other", "knn", {"10 Top 1": 4.5}, "/b/eval/training_9/teacher.pth", eval=FACES)
    rows = {row.name: row for row in report.collect([tmp_path])}
    assert list(rows) == ["a", "b", "b/logreg-2", "b/other"]
    assert [len(row.values) for row in rows.values()] == [2, 2, 1, 1]
    assert [row.model for row in rows.values()] == ["a, iteration 7", *["b, iteration 7"] * 2, "b, iteration 9"]


def test_results_of_several_models_in_one_directory_are_rows_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, "knn", {"10 Top 1": 1.5}, "ViT-S", eval=DIGITS)
    write(tmp_path, "log-regression", {"top-1": 99.0}, "ViT-L", eval=DIGITS)
    write(tmp_path, "linear", {"VAL_accuracy": 98.0, "best_classifier": "x"}, "ViT-L")
    rows = report.collect([tmp_path])
    assert [(row.model, len(row.values)) for row in rows] == [("ViT-S", 1), ("ViT-L", 2)]
    assert [row.name for row in rows] == [f"{tmp_path.name} (ViT-S)", f"{tmp_path.name} (ViT-L)"]


def test_models_whose_results_lie_side_by_side_have_names_of_their_own(tmp_path: Path) -> None:
    for model in ("vits", "vitb"):
        write(tmp_path / f"{model}_knn", "knn", {"10 Top 1": 1.5}, model, eval=DIGITS)
        write(tmp_path / f"{model}_logreg", "log-regression", {"top-1": 2.5}, model, eval=DIGITS)
    rows = report.collect([tmp_path])
    assert [row.name for row in rows] == [f"{tmp_path.name} (vitb)", f"{tmp_path.name} (vits)"]


def test_models_of_the_same_short_name_are_not_joined(tmp_path: Path) -> None:
    write(tmp_path / "knn", "knn", {"10 Top 1": 1.5}, "/a/run/eval/training_9/teacher.pth")
    write(tmp_path / "logreg", "log-regression", {"top-1": 2.5}, "/b/run/eval/training_9/teacher.pth")
    assert [row.name for row in report.collect([tmp_path])] == ["knn", "logreg"]


def test_few_shot_and_other_features_are_other_columns(tmp_path: Path) -> None:
    few: dict[str, Any] = {"eval": DIGITS, "few_shot": {"enable": True, "k_or_percent": 5.0, "n_tries": 1}}
    part = few | {"few_shot": {"enable": True, "k_or_percent": 0.01, "n_tries": 1}}
    mean = {"eval": DIGITS | {"feature": "PATCH_MEAN"}, "few_shot": {"enable": False}}
    for number, config in enumerate(({"eval": DIGITS | {"feature": "CLS"}}, few, part, mean)):
        write(tmp_path / str(number), "knn", {"10 Top 1": 1.5}, "ViT-S", **config)
    write(tmp_path / "0", "linear", {"VAL_accuracy": 98.0}, "ViT-S", few_shot=few["few_shot"])
    rows = report.collect([tmp_path])
    assert len(rows) == 1
    assert [str(column) for column in sorted(rows[0].values, key=str)] == [
        "VAL, linear, 5 per class",
        *("data/digits/test, 10-NN", "data/digits/test, 10-NN, 1% per class", "data/digits/test, 10-NN, 5 per class"),
        "data/digits/test, 10-NN, patch_mean",
    ]


def test_other_datasets_and_metrics_are_other_columns(tmp_path: Path) -> None:
    train = {"val_dataset": "ImageNet:split=VAL:root=/i:extra=/e", "val_metric_type": "MEAN_ACCURACY"}
    tests = {
        "test_datasets": ["ImageNet:split=VAL:root=/i:extra=/e", "ImageNetC:root=/c"],
        "test_metric_types": ["MEAN_PER_CLASS_ACCURACY", "IMAGENET_C_METRIC"],
    }
    for name, corruption in (("x", 40.0), ("y", 50.0)):
        scores = {
            "ImageNetC:root=/c_accuracy": corruption,
            "ImageNet:split=VAL:root=/i:extra=/e_mean_per_class_accuracy_accuracy": 2.0,
            "ImageNet:split=VAL:root=/i:extra=/e_accuracy": 3.0,
        }
        write(tmp_path / name, "linear", scores, name, train=train, eval=tests)
        write(tmp_path / name, "knn", {"1 Top 1": 4.0}, name, eval=FACES)
    lines = report.format_table(report.collect([tmp_path])).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[3:-1]] == [
        "faces/test, 1-NN, mean_per_class_accuracy",
        "ImageNetC, linear, imagenet_c_metric",
        "ImageNet VAL, linear",
        "ImageNet VAL, linear, mean_per_class_accuracy",
    ]
    # Of corruption errors the smaller is the better.
    assert lines[2] == "| x | x | **4.00** | **40.00** | **3.00** | **2.00** |"
    assert lines[3] == "| y | y | **4.00** | 50.00 | **3.00** | **2.00** |"


def test_command_writes_table_and_chart(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(runs / "small"), str(runs / "large"), "--output-dir", str(runs / "out")]) == 0
    table = (runs / "out" / "report.md").read_text()
    assert table in capsys.readouterr().out
    with Image.open(runs / "out" / "report.png") as chart:
        assert chart.format == "PNG" and min(chart.size) > 200
        assert np.asarray(chart.convert("L")).std() > 10
    assert sorted(path.name for path in (runs / "out").iterdir()) == ["report.md", "report.png"]


def test_directories_without_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such directory"):
        report.collect([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match=r"no results-knn\.csv, .* in it or below it"):
        report.collect([tmp_path])


@pytest.mark.parametrize("text", ["", "10 Top 1\n1\n2\n"])
def test_file_that_is_no_table_of_one_row_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "results-knn.csv").write_text(text)
    with pytest.raises(ValueError, match=r"results-knn\.csv"):
        report.collect([tmp_path])


def test_damaged_provenance_is_named(tmp_path: Path) -> None:
    write(tmp_path, "knn", {"10 Top 1": 1.5})
    (tmp_path / "results-knn.json").write_text("{")
    with pytest.raises(ValueError, match=r"results-knn\.json cannot be read"):
        report.collect([tmp_path])
