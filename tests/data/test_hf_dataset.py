"""Images of Hugging Face datasets, from real small files."""

from __future__ import annotations

import builtins
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .tars import cut_off, png

datasets = pytest.importorskip("datasets")

from dinov3.data import make_dataset  # noqa: E402
from dinov3.data.datasets import BadImageError, HFDataset  # noqa: E402

NAMES = ["cat", "dog"]


def table(n: int = 4, **features: Any) -> Any:
    columns: dict[str, Any] = {
        "image": [{"bytes": png(number), "path": f"{number}.png"} for number in range(n)],
        "label": [number % 2 for number in range(n)],
    }
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds | features))


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    path = str(tmp_path / "saved")
    table().save_to_disk(path)
    return path


def grays(dataset: HFDataset) -> list[int]:
    return [dataset[index][0].getpixel((0, 0))[0] for index in range(len(dataset))]


def test_a_saved_table_gives_images_labels_and_names(saved: str) -> None:
    dataset = HFDataset(path=saved)
    assert grays(dataset) == [0, 1, 2, 3]
    assert dataset[0][0].mode == "RGB" and dataset.get_image_data(2) == png(2)
    assert dataset.get_targets().tolist() == [dataset[index][1] for index in range(4)] == [0, 1, 0, 1]
    assert dataset.get_targets().dtype == np.int64
    assert dataset.classes == NAMES and dataset.get_class_name(1) == "dog"
    assert dataset.get_image_relpath(3) == "3.png"


def test_splits_of_a_saved_dictionary_are_chosen_by_name(tmp_path: Path) -> None:
    path = str(tmp_path / "both")
    datasets.DatasetDict({"train": table(3), "validation": table(2)}).save_to_disk(path)
    assert len(HFDataset(path=path)) == 3
    assert len(make_dataset(dataset_str=f"HFDataset:path={path}:split=VALIDATION")) == 2
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        HFDataset(path=path, split="test")


def test_a_single_table_has_no_other_split(saved: str) -> None:
    with pytest.raises(ValueError, match="is a single table .*, it has no split 'test'"):
        HFDataset(path=saved, split="test")


def test_a_shuffled_table_keeps_images_and_labels_together(tmp_path: Path) -> None:
    path = str(tmp_path / "shuffled")
    table(8).shuffle(seed=1).save_to_disk(path)
    dataset = HFDataset(path=path)
    assert grays(dataset) != list(range(8))
    assert dataset.get_targets().tolist() == [gray % 2 for gray in grays(dataset)]


def test_a_directory_of_parquet_files_is_opened(tmp_path: Path) -> None:
    (tmp_path / "parquet").mkdir()
    table().to_parquet(str(tmp_path / "parquet" / "train-00000.parquet"))
    dataset = HFDataset(path=str(tmp_path / "parquet"))
    assert grays(dataset) == [0, 1, 2, 3] and dataset.get_targets().tolist() == [0, 1, 0, 1]


def test_a_directory_of_images_is_opened(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / "images" / "train" / NAMES[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    dataset = HFDataset(path=str(tmp_path / "images"))
    assert sorted(grays(dataset)) == [0, 1, 2, 3] and dataset.classes == NAMES
    assert dataset.get_image_relpath(0).endswith("0.png")


def test_columns_of_other_names_and_kinds(tmp_path: Path) -> None:
    rows = {"jpg": [png(7)], "number": [5], "text": ["five"]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "columns"))
    path = str(tmp_path / "columns")
    dataset = HFDataset(path=path, image="jpg", label="number")
    assert grays(dataset) == [7] and dataset[0][1] == 5 and dataset.classes is None
    assert dataset.get_image_relpath(0) == "row 0"
    assert HFDataset(path=path, image="jpg").get_targets() is None
    with pytest.raises(ValueError, match="the labels of .* have no names"):
        dataset.get_class_name(0)


def test_labels_that_are_text_do_not_stop_who_needs_none(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"image": [png(1), png(2)], "label": ["cat", "dog"]})
    table.save_to_disk(tmp_path / "text")
    dataset = make_dataset(dataset_str=f"HFDataset:path={tmp_path}/text")
    assert [(image.getpixel((0, 0))[0], target) for image, target in (dataset[0], dataset[1])] == [(1, None), (2, None)]
    assert dataset.classes is None
    with pytest.raises(ValueError, match=r"the column 'label' of .* holds .*string.*, not class indices"):
        dataset.get_targets()
    with pytest.raises(ValueError, match="not class indices"):
        HFDataset(path=str(tmp_path / "text"), label="label")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image": "picture"}, "has no column 'picture'; name one with image=: it has image, label"),
        ({"label": "class"}, "has no column 'class'; name one with label=: it has image, label"),
        ({"image": "label"}, "the column 'label' of .* holds ClassLabel.*, not images: expected encoded images"),
        ({"label": "image"}, "the column 'image' of .* holds Image.*, not class indices: expected integers"),
    ],
)
def test_columns_that_are_not_what_they_should_be_are_named(kwargs: dict[str, str], message: str, saved: str) -> None:
    with pytest.raises(ValueError, match=message):
        HFDataset(path=saved, **kwargs)


def test_an_empty_label_key_means_no_labels(saved: str) -> None:
    dataset = make_dataset(dataset_str=f"HFDataset:path={saved}:label=")
    assert dataset.get_targets() is None and dataset[0][1] is None


def test_missing_labels_are_none_and_all_missing_are_no_labels(tmp_path: Path) -> None:
    kind = datasets.Value("int64")
    some = table(2).remove_columns("label").add_column("label", [1, None], feature=kind)
    none = table(2).remove_columns("label").add_column("label", [-1, -1], feature=kind)
    some.save_to_disk(str(tmp_path / "some"))
    none.save_to_disk(str(tmp_path / "none"))
    dataset = HFDataset(path=str(tmp_path / "some"))
    assert [dataset.get_target(0), dataset.get_target(1)] == [1, None]
    with pytest.raises(ValueError, match=r"1 of 2 samples have no label, the first is 1\.png"):
        dataset.get_targets()
    assert HFDataset(path=str(tmp_path / "none")).get_targets() is None


def test_bad_and_missing_images_are_named(tmp_path: Path) -> None:
    images = [{"bytes": b"nothing", "path": "a.png"}, None]
    datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()})).save_to_disk(
        str(tmp_path / "bad")
    )
    dataset = HFDataset(path=str(tmp_path / "bad"))
    for index, where in enumerate((r"/bad/a\.png: Unidentified", "row 1: ValueError")):
        with pytest.raises(BadImageError, match=rf"HFDataset: cannot read image {index}, .*{where}"):
            dataset[index]


def test_a_column_of_paths_reads_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(6))
    paths = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    datasets.Dataset.from_dict({"image": paths}).save_to_disk(str(tmp_path / "paths"))
    dataset = HFDataset(path=str(tmp_path / "paths"))
    assert dataset[0][0].getpixel((0, 0))[0] == 6 and dataset.get_image_relpath(0) == paths[0]
    with pytest.raises(BadImageError, match=rf"HFDataset: cannot read image 1, {paths[1]}: FileNotFoundError"):
        dataset[1]


def test_a_damaged_table_is_named(saved: str) -> None:
    cut_off(next(Path(saved).glob("*.arrow")), 300)
    with pytest.raises(ValueError, match=rf"HFDataset: `datasets` cannot open {saved}: \w+: "):
        HFDataset(path=saved)


def test_paths_that_do_not_exist_are_named_without_asking_the_hub(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/nowhere", "./nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=rf"HFDataset: the directory {path} does not exist"):
            HFDataset(path=path)


def test_a_directory_without_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"HFDataset: {tmp_path} has no data that `datasets` can read"):
        HFDataset(path=str(tmp_path))


def test_a_table_without_rows_is_an_error(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: table(1).select([]))
    with pytest.raises(FileNotFoundError, match=r"HFDataset: .*saved \(split train\) has no rows"):
        HFDataset(path=saved)


def test_a_name_that_the_hub_does_not_have_is_named() -> None:
    with pytest.raises((FileNotFoundError, ValueError), match="HFDataset: .*nobody/nothing"):
        HFDataset(path="nobody/nothing")


def test_without_the_package_the_command_that_installs_it_is_given(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'", name="datasets")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"HFDataset needs the package `datasets`.*: pip install datasets"):
        make_dataset(dataset_str=f"HFDataset:path={saved}")


def test_a_pickled_copy_reads(saved: str) -> None:
    data = pickle.dumps(HFDataset(path=saved))
    assert len(data) < 10_000 and grays(pickle.loads(data)) == [0, 1, 2, 3]


def test_home_is_expanded(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", os.path.dirname(saved))
    assert len(HFDataset(path="~/saved")) == 4
