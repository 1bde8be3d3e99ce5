"""Test sets that have only some of the training classes, as ImageNet-R and -A: only their scores are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinov3.eval import knn, linear, log_regression
from dinov3.eval.command import results

from .. import real_data

PART = ["2", "5", "7"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, digits, and links to the test images of three of them."""
    root = tmp_path_factory.mktemp("classes")
    real_data.write_run(root / "run")
    real_data.write_digits(root / "digits", 240)
    for name in PART:
        (root / "three").mkdir(exist_ok=True)
        (root / "three" / name).symlink_to(root / "digits" / "test" / name)
    return root


def run(module: Any, root: Path, out: Path, **settings: Any) -> None:
    argv = [
        f"model.pretrained_weights={root}/run",
        *real_data.size_settings(),
        f"train.dataset=ImageFolder:root={root}/digits/train",
        *(f"{name.replace('__', '.')}={value}" for name, value in settings.items()),
        f"output_dir={out}",
        *("save_results=true", "--no-cache"),
    ]
    assert module.main(argv) == 0


def predictions(out: Path, stem: str = "") -> tuple[np.ndarray, np.ndarray]:
    (preds,), (target,) = (sorted(out.glob(f"{name}{stem}*.npy")) for name in ("preds", "target"))
    return np.load(preds), np.load(target)


def check(whole: tuple[np.ndarray, np.ndarray], part: tuple[np.ndarray, np.ndarray]) -> float:
    """Check that the part has the scores of the whole in its rows and classes; return its accuracy in percent."""
    classes = [int(name) for name in PART]
    rows = np.isin(whole[1], classes)
    np.testing.assert_allclose(part[0], whole[0][rows][:, classes], rtol=1e-5, atol=1e-6)
    assert [classes[target] for target in part[1]] == whole[1][rows].tolist()
    assert part[0].shape == (int(rows.sum()), 3) and len(part[0]) > 10
    return 100 * float((part[0].argmax(axis=1) == part[1]).mean())


@pytest.mark.parametrize(
    "module, settings, column",
    [(knn, {"train__ks": "[10]"}, "10 Top 1"), (log_regression, {"train__max_train_iters": 30}, "top-1")],
)
def test_scores_are_those_of_the_part(
    module: Any, settings: dict[str, Any], column: str, root: Path, tmp_path: Path
) -> None:
    for name, images in (("whole", "digits/test"), ("part", "three")):
        run(module, root, tmp_path / name, eval__test_dataset=f"ImageFolder:root={root}/{images}", **settings)
    accuracy = check(predictions(tmp_path / "whole"), predictions(tmp_path / "part"))
    (table,) = (tmp_path / "part").glob("results-*.csv")
    assert results.load(table).columns[column][0] == pytest.approx(accuracy)


def test_scores_of_linear_classifiers_are_those_of_the_part(root: Path, tmp_path: Path) -> None:
    whole, part = f"ImageFolder:root={root}/digits/test", f"ImageFolder:root={root}/three"
    run(
        linear,
        root,
        tmp_path,
        train__val_dataset=whole,
        eval__test_datasets=f"[{part}]",
        train__augment="false",
        train__epochs=1,
        train__epoch_length=20,
        train__learning_rates="[0.1]",
    )
    names = [f"_*{text}" for text in ("digits_test", "three")]
    accuracy = check(*(predictions(tmp_path, stem) for stem in names))  # type: ignore[arg-type]
    table = results.load(tmp_path / "results-linear.csv")
    assert table.columns[f"{part}_accuracy"][0] == pytest.approx(accuracy)


def test_validation_images_of_a_part_choose_C_by_their_training_classes(root: Path, tmp_path: Path) -> None:
    whole, part = f"ImageFolder:root={root}/digits/test", f"ImageFolder:root={root}/three"
    settings: dict[str, Any] = {"train__val_dataset": part, "eval__test_dataset": whole, "train__max_train_iters": 30}
    run(log_regression, root, tmp_path, **settings)
    table = results.load(tmp_path / "sweep-log-regression.csv")
    assert max(table.columns["val top-1"]) > 70  # chance would be 10
