"""Each evaluation on real labelled images, from its command line; by two processes with the numbers of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from dinov3.data import make_classification_eval_transform, make_dataset
from dinov3.eval import report
from dinov3.eval.command import results
from dinov3.hub.runs import dinov3_from_run
from tests.multiprocess import launch

from . import real_data

#: Dataset strings of training and test images, by name.
DATASETS = {
    "digits": ("ImageFolder:root={root}/digits/train", "ImageFolder:root={root}/digits/test"),
    "faces": ("ImageFolder:root={root}/faces:split=train", "ImageFolder:root={root}/faces:split=test"),
    "imagenet": (
        "ImageNet:split=TRAIN:root={root}/imagenet:extra={root}/imagenet/extra",
        "ImageNet:split=VAL:root={root}/imagenet:extra={root}/imagenet/extra",
    ),
}
FEW_SHOT = ["few_shot.enable=true", "few_shot.k_or_percent=8", "few_shot.n_tries=2"]
#: By the name of an evaluation: its dataset, its command, and what it asks for besides.
EVALUATIONS: dict[str, tuple[str, str, list[str]]] = {
    "digits-knn": ("digits", "knn", []),
    "digits-uniform": ("digits", "knn", ["train.temperature=inf"]),
    "digits-logreg": ("digits", "log_regression", []),
    "faces-knn": ("faces", "knn", ["eval.feature=PATCH_MEAN", "train.ks=[1,5,1000]"]),
    "faces-logreg": ("faces", "log_regression", ["train.max_train_iters=20"]),
    "imagenet-knn": ("imagenet", "knn", [*FEW_SHOT, "eval.test_metric_type=MEAN_PER_CLASS_ACCURACY"]),
    "imagenet-linear": ("imagenet", "linear", ["train.augment=true", "train.n_last_blocks_list=[1,2]"]),
}
BY_TWO = ["faces-logreg", "imagenet-knn", "imagenet-linear"]
GLOBAL_BATCH = 64
#: Top-1 in percent that features of the random backbone reach at least.
REACHED = {"digits-knn": 60, "digits-logreg": 75, "faces-knn": 80, "faces-logreg": 85, "imagenet-knn": 35}


def commands(root: Path, n_processes: int) -> list[list[str]]:
    out = root / f"by{n_processes}"
    made = []
    for name in EVALUATIONS if n_processes == 1 else BY_TWO:
        dataset, command, more = EVALUATIONS[name]
        train, test = (text.format(root=root) for text in DATASETS[dataset])
        argv = [
            f"model.pretrained_weights={root}/run",
            *real_data.size_settings(),
            f"train.dataset={train}",
            f"features.cache_dir={root}/cache{n_processes}",
            f"output_dir={out}/{name}",
            "save_results=true",
        ]
        if command == "linear":
            # Twice the processes, half the images of each: the same batch of all.
            argv += [f"train.val_dataset={test}", f"eval.test_datasets=[{test}]", "eval.test_metric_types=[AUROC]"]
            argv += [f"train.batch_size={GLOBAL_BATCH // n_processes}", "train.epochs=1", "train.epoch_length=null"]
            argv += ["train.learning_rates=[0.01,0.05,0.2]", "train.checkpoint_retention_policy=LAST"]
        else:
            argv += [f"eval.test_dataset={test}"]
        made.append([f"dinov3.eval.{command}", *argv, *more])
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images, the run, and the results of all evaluations, by one process and by two."""
    root = tmp_path_factory.mktemp("real")
    real_data.write_digits(root / "digits", 400)
    real_data.write_faces(root / "faces")
    real_data.write_imagenet(root / "imagenet", 240)
    real_data.write_run(root / "run")
    real_data.run_commands(commands(root, 1))
    launch(real_data.run_commands, 2, commands(root, 2), output=root / "printed.txt")
    return root


def files_of(directory: Path) -> dict[str, Path]:
    found = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    return {name: path for name, path in found.items() if not name.startswith("logs/")}


def results_of(path: Path) -> Any:
    content = json.loads(path.read_text())
    return {
        name: content[name] for name in ("results", "sweep", "chosen_C", "validation", "datasets") if name in content
    }


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", BY_TWO)
def test_two_processes_give_every_number_of_one(name: str, root: Path) -> None:
    one, two = (files_of(root / by / name) for by in ("by1", "by2"))
    assert one.keys() == two.keys()
    n_compared = 0
    for file, path in one.items():
        if path.suffix == ".npy":
            np.testing.assert_allclose(np.load(path), np.load(two[file]), rtol=1e-3, atol=1e-4)
        elif file.startswith("results-") and path.suffix == ".json":
            assert results_of(path) == results_of(two[file])
        elif path.suffix in (".csv", ".json", ".jsonl"):
            assert path.read_text() == two[file].read_text()
        else:
            continue
        n_compared += 1
    assert n_compared >= 4


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", REACHED)
def test_features_of_real_images_tell_their_classes_apart(name: str, root: Path) -> None:
    (path,) = (root / "by1" / name).glob("results-*.csv")
    row = results.load(path).rows()[0]
    best = max(value for key, value in row.items() if key.lower().endswith(("top 1", "top-1", "top-1_mean")))
    assert best >= REACHED[name], row


def features_of(root: Path, part: str) -> tuple[Any, Any]:
    """Class tokens of the digits, float64, and their labels, computed without any code of the evaluations."""
    size = real_data.SIDE
    dataset = make_dataset(
        dataset_str=f"ImageFolder:root={root}/digits/{part}",
        transform=make_classification_eval_transform(resize_size=size, crop_size=size),
    )
    with torch.no_grad():
        features = dinov3_from_run(root / "run")(torch.stack([dataset[index][0] for index in range(len(dataset))]))
    return features.double().numpy(), dataset.get_targets()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-knn", "digits-uniform"])
def test_neighbours_predict_what_scikit_learn_predicts(name: str, root: Path) -> None:
    def weigh(distances: Any) -> Any:
        return np.exp((1 - distances) / 0.07)

    weights = weigh if name == "digits-knn" else "uniform"
    train, (test, _) = features_of(root, "train"), features_of(root, "test")
    for k in (10, 20, 100):
        classifier = KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute")
        want = classifier.fit(*train).predict(test)
        assert (np.load(root / "by1" / name / f"preds_k_{k}.npy").argmax(axis=1) == want).all()


@pytest.mark.distributed
@pytest.mark.slow
def test_logistic_regression_predicts_what_scikit_learn_predicts(root: Path) -> None:
    content = json.loads((root / "by1" / "digits-logreg" / "results-log-regression.json").read_text())
    model = LogisticRegression(C=content["chosen_C"]["try 0"], tol=1e-6, max_iter=5000)
    want = model.fit(*features_of(root, "train")).predict(features_of(root, "test")[0])
    assert content["solver"] == "torch"
    found = np.load(root / "by1" / "digits-logreg" / "preds.npy").argmax(axis=1)
    assert (found == want).mean() >= 0.99


@pytest.mark.distributed
@pytest.mark.slow
def test_all_of_them_are_in_one_report(root: Path) -> None:
    rows = report.collect([root / "by1", root / "by2"])
    assert len(rows) == 3  # evaluations of one model share rows, as far as their columns differ
    assert all(row.values and "iteration 9" in row.model for row in rows)
