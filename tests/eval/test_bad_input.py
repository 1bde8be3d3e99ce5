"""What users get wrong, given to each command: one clear error, before the first image is read."""

from __future__ import annotations

import csv
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.data.datasets import ImageNet
from dinov3.data.datasets.extended import ExtendedVisionDataset
from dinov3.eval import knn, linear, log_regression
from dinov3.eval.features.cache import FeaturesConfig

from . import real_data

COMMANDS = pytest.mark.parametrize("module", [knn, log_regression, linear], ids=["knn", "logreg", "linear"])


def write(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), value, dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and folders of 12 images each: good ones, and ones with something wrong."""
    root = tmp_path_factory.mktemp("bad")
    real_data.write_run(root / "run")
    for number in range(12):
        name, value = "cat" if number % 2 else "dog", 20 * number
        for folder in ("train", "test"):
            write(root / folder / name / f"{number}.png", value)
        write(root / "others" / ("cat" if number % 2 else "eel") / f"{number}.png", value)
        write(root / "single" / "cat" / f"{number}.png", value)
        write(root / "unlabelled" / f"{number}.png", value)
        write(root / "imagenet" / "train" / f"n{number % 2}" / f"n{number % 2}_{number}.JPEG", value)
    with open(root / "imagenet" / "labels.txt", "w", newline="") as file:
        csv.writer(file).writerows([["n0", "cat"], ["n1", "dog"]])
    ImageNet(split=ImageNet.Split.TRAIN, root=str(root / "imagenet"), extra=str(root / "imagenet")).dump_extra()
    (root / "nothing").mkdir()
    (root / "file").write_text("")
    return root


@pytest.fixture
def no_image_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, index: int) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(ExtendedVisionDataset, "load_image", fail)


def command(module: Any, root: Path, out: Path, **settings: Any) -> list[str]:
    """A good command, changed by settings such as `train__batch_size`; `test` is what the command tests on."""
    test_key = "train.val_dataset" if module is linear else "eval.test_dataset"
    values = {
        "model.pretrained_weights": root / "run",
        "train.dataset": f"ImageFolder:root={root}/train",
        test_key: f"ImageFolder:root={root}/test",
        "output_dir": out,
        "features.cache": "false",
    }
    given = {test_key if name == "test" else name.replace("__", "."): value for name, value in settings.items()}
    sizes = dict(token.split("=") for token in real_data.size_settings())
    return [f"{name}={value}" for name, value in (sizes | values | given).items()]


def folder(root: Path, name: str) -> str:
    return f"ImageFolder:root={root}/{name}"


BAD_DATASETS: dict[str, tuple[dict[str, str], str]] = {
    "no test directory": ({"test": "ImageFolder:root={root}/gone"}, "gone' is not a directory"),
    "no training directory": ({"train__dataset": "ImageFolder:root={root}/gone"}, "gone' is not a directory"),
    "no test images": ({"test": "ImageFolder:root={root}/nothing"}, "no images in .*nothing"),
    "wrong name of a folder's split": (
        {"test": "ImageFolder:root={root}:split=tset"},
        "no directory .*tset; .*has .*test",
    ),
    "wrong name of a split": (
        {"test": "ImageNet:split=VLA:root={root}/imagenet:extra={root}/imagenet"},
        r"unknown split 'VLA' \(did you mean 'VAL'\?\)",
    ),
    "no listing of a split": (
        {"test": "ImageNet:split=VAL:root={root}/imagenet:extra={root}/imagenet"},
        "entries-VAL.npy.*dinov3.data.datasets.dump",
    ),
    "unknown kind of dataset": ({"test": "ImageFoldr:root={root}/test"}, "ImageFoldr"),
    "other classes": ({"test": "ImageFolder:root={root}/others"}, "1 of the 2 classes .*'eel'.*'cat', 'dog'"),
    "no labels to train": ({"train__dataset": "ImageFolder:root={root}/unlabelled"}, "no labels"),
    "no labels to test": ({"test": "ImageFolder:root={root}/unlabelled"}, "no labels"),
    "a single class": (
        {
            "train__dataset": "ImageFolder:root={root}/single:labels=folder",
            "test": "ImageFolder:root={root}/single:labels=folder",
        },
        "single class|training images are of class 0",
    ),
}


#: Logistic regression opens and checks its datasets as k-NN does, with the same functions.
@pytest.mark.parametrize("module", [knn, linear], ids=["knn", "linear"])
@pytest.mark.parametrize("name", BAD_DATASETS)
def test_bad_dataset_is_named(module: Any, name: str, root: Path, tmp_path: Path, no_image_is_read: None) -> None:
    settings, message = BAD_DATASETS[name]
    argv = command(module, root, tmp_path, **{key: text.format(root=root) for key, text in settings.items()})
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        module.main(argv)
    assert not list(tmp_path.glob("results*"))


BAD_SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "crop larger than the image": ({"transform__crop_size": "17"}, "crop_size=17.*not larger than the resized"),
    "crop smaller than a patch": ({"transform__crop_size": "3"}, "crop_size=3: the model needs .* 4 pixels"),
    "no crop": ({"transform__crop_size": "0"}, "crop_size=0"),
    "cache that cannot be": (
        {"features__cache": "true", "features__cache_dir": "{root}/file/x"},
        "cache_dir=.*/file/x",
    ),
    "output that cannot be": ({"output_dir": "{root}/file/x"}, "output directory .*/file/x cannot be made"),
    "negative budget": ({"features__memory_budget_mb": "-1"}, "features.memory_budget_mb=-1"),
    "few-shot without a number": ({"few_shot__enable": "true"}, "few_shot.k_or_percent"),
    "wrong type": ({"train__batch_size": "many"}, "train.batch_size"),
    "unknown key": ({"train__batchsize": "3"}, "unknown key 'train.batchsize'.*did you mean 'train.batch_size'"),
}


#: Which command it is makes no difference: these sections and `run_command` are shared.
@pytest.mark.parametrize(
    "module, name", list(zip(itertools.cycle([knn, log_regression, linear]), BAD_SETTINGS, strict=False))
)
def test_bad_setting_is_named(module: Any, name: str, root: Path, tmp_path: Path, no_image_is_read: None) -> None:
    settings, message = BAD_SETTINGS[name]
    argv = command(module, root, tmp_path, **{key: text.format(root=root) for key, text in settings.items()})
    with pytest.raises((ValueError, OSError, RuntimeError), match=f"(?s){message}"):
        module.main(argv)


OWN_SETTINGS: list[tuple[Any, dict[str, str], str]] = [
    (knn, {"eval__test_metric_type": "GROUPBY_ANY_MATCH_ACCURACY_1"}, "needs images that know their groups"),
    (knn, {"eval__test_metric_type": "MEAN_MULTILABEL_F1"}, "MEAN_MULTILABEL_F1 needs multi-hot rows"),
    (knn, {"eval__test_metric_type": "ANY_MATCH_ACCURACY"}, "needs a list of classes per image, but eval.test_dataset"),
    (knn, {"train__temperature": "nan"}, "train.temperature=nan"),
    (log_regression, {"eval__test_metric_type": "ANY_MATCH_ACCURACY"}, "needs a list of classes per image"),
    (log_regression, {"eval__test_metric_type": "IMAGENET_C_METRIC"}, "needs rows of class, corruption and level"),
    (log_regression, {"eval__test_metric_type": "GROUPBY_ANY_MATCH_ACCURACY_1"}, "needs images that know their groups"),
    (log_regression, {"train__val_dataset": "ImageFolder:root={root}/gone"}, "gone' is not a directory"),
    (log_regression, {"train__val_dataset": "ImageFolder:root={root}/others"}, "classes of train.val_dataset .*'eel'"),
    (linear, {"eval__test_datasets": "[ImageFolder:root={root}/gone]"}, "gone' is not a directory"),
    (linear, {"train__val_metric_type": "ANY_MATCH_ACCURACY"}, "needs a list of classes per image"),
    (linear, {"train__n_last_blocks_list": "[1,3]"}, r"n_last_blocks_list=\[1, 3\]: the model has only 2 blocks"),
    (linear, {"train__classifier_fpath": "{root}/gone"}, "train.classifier_fpath=.*gone"),
    (
        linear,
        {"train__classifier_fpath": "{root}/run", "train__resume": "false"},
        "classifier_fpath.*train.resume=true",
    ),
    (linear, {"train__loss_type": "BINARY_CROSS_ENTROPY"}, "BINARY_CROSS_ENTROPY does not go with one class per image"),
]


@pytest.mark.parametrize("module, settings, message", OWN_SETTINGS)
def test_bad_setting_of_one_command_is_named(
    module: Any, settings: dict[str, str], message: str, root: Path, tmp_path: Path, no_image_is_read: None
) -> None:
    argv = command(module, root, tmp_path, **{key: text.format(root=root) for key, text in settings.items()})
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        module.main(argv)


def test_missing_scikit_learn_is_named_before_any_image_is_read(
    root: Path, tmp_path: Path, no_image_is_read: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match="pip install scikit-learn, or choose train.solver=TORCH"):
        log_regression.main(command(log_regression, root, tmp_path, train__solver="SKLEARN"))


@COMMANDS
def test_good_input_is_evaluated(module: Any, root: Path, tmp_path: Path) -> None:
    more = {"train__epochs": 1, "train__epoch_length": 2} if module is linear else {}
    assert module.main(command(module, root, tmp_path, **more)) == 0
    assert (tmp_path / module.RESULTS_FILENAME).is_file()


@COMMANDS
def test_more_neighbours_or_images_than_there_are_count_as_all(module: Any, root: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"few_shot__enable": "true", "few_shot__k_or_percent": 4}
    more |= {"train__epochs": 1, "train__epoch_length": 2} if module is linear else {}
    more |= {"train__ks": "[3,500]"} if module is knn else {}
    assert module.main(command(module, root, tmp_path, **more)) == 0


@pytest.mark.parametrize("module, augment", [(knn, ""), (log_regression, ""), (linear, "false"), (linear, "true")])
def test_model_that_gives_nan_is_refused(module: Any, augment: str, root: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(root / "run" / "eval" / "training_9" / "teacher_checkpoint.pth")
    checkpoint["teacher"]["backbone.norm.weight"][3] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.pth")
    more: dict[str, Any] = {"model__pretrained_weights": tmp_path / "nan.pth"}
    more |= {"train__augment": augment} if augment else {}
    argv = command(module, root, tmp_path / "out", **more, model__config_file=root / "run" / "config.yaml")
    with pytest.raises(ValueError, match="the model returns NaN or infinite features"):
        module.main(argv)


def test_cache_directory_of_ones_own_is_made(tmp_path: Path) -> None:
    FeaturesConfig(cache_dir=str(tmp_path / "new" / "cache")).make_store()
    assert (tmp_path / "new" / "cache").is_dir()
