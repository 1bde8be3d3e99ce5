"""Files of features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinov3.eval.features.files import load_features_dict, save_features_dict

ENDINGS = [".safetensors", ".pt", ".npy"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_features_load_back(tmp_path: Path, ending: str) -> None:
    features = {
        "train_features": torch.randn(5, 3),
        "turned": torch.randn(3, 5).T,
        "train_labels": torch.arange(5),
        "multi_hot": torch.tensor([[True, False]]),
        "half": torch.randn(2, 2, 2).half(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7),
    }
    path = tmp_path / "new" / f"features{ending}"
    save_features_dict(features | {"array": np.arange(3, dtype=np.int16)}, path)
    loaded = load_features_dict(path)
    assert list(path.parent.iterdir()) == [path]
    assert loaded.keys() == features.keys() | {"array"}
    assert loaded.pop("array").tolist() == [0, 1, 2]
    for name, tensor in loaded.items():
        assert tensor.dtype == features[name].dtype and torch.equal(tensor, features[name]), name
        tensor += tensor  # What was read can be written to.
    path.write_bytes(bytes(path.stat().st_size))  # as another file copied over it
    assert loaded["train_features"].sum() == 2 * features["train_features"].sum()


def test_arrays_of_other_programs_are_read(tmp_path: Path) -> None:
    arrays = {"big": np.arange(4, dtype=">f8"), "fortran": np.asfortranarray(np.arange(6).reshape(2, 3))}
    np.save(tmp_path / "f.npy", arrays)  # type: ignore[arg-type]
    loaded = load_features_dict(tmp_path / "f.npy")
    assert loaded["big"].tolist() == [0, 1, 2, 3] and loaded["fortran"].tolist() == [[0, 1, 2], [3, 4, 5]]
    save_features_dict(arrays, tmp_path / "f.safetensors")
    assert load_features_dict(tmp_path / "f.safetensors")["big"].tolist() == [0, 1, 2, 3]


class Attack:
    """Makes the directory `target` when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.target,)


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_code_is_run(tmp_path: Path, ending: str) -> None:
    content: Any = {"features": Attack(tmp_path / "harm")}
    path = tmp_path / f"f{ending}"
    if ending == ".npy":
        np.save(path, content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="run code"):
        load_features_dict(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content", [{"a": np.array(["text"])}, {"a": {"b": np.zeros(1)}}, {"a": np.array([None])}, [np.zeros(1)], {"a": 1}]
)
def test_arrays_that_are_no_numbers_are_refused(tmp_path: Path, content: Any) -> None:
    holder = np.empty((), dtype=object)
    holder[()] = content
    np.save(tmp_path / "f.npy", holder)
    with pytest.raises(ValueError, match="dictionary of arrays"):
        load_features_dict(tmp_path / "f.npy")


@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_truncated_files_are_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "f.npy"
    save_features_dict({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match="damaged"):
        load_features_dict(path)


def test_plain_arrays_are_no_features(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.zeros(3))
    with pytest.raises(ValueError, match="array of float64"):
        load_features_dict(tmp_path / "f.npy")


def test_other_endings_and_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.safetensors, \.pt, \.npy"):
        save_features_dict({"a": torch.zeros(1)}, tmp_path / "f.csv")
    with pytest.raises(ValueError, match=r"\.safetensors, \.pt, \.npy"):
        load_features_dict(tmp_path / "f.csv")
    with pytest.raises(ValueError, match="'a' is a dict"):
        save_features_dict({"a": {}}, tmp_path / "f.pt")  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="array of numbers"):
        save_features_dict({"a": np.array(["text"])}, tmp_path / "f.npy")
    assert not list(tmp_path.iterdir())


def test_one_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov3.distributed.is_main_process", lambda: False)
    save_features_dict({"a": torch.zeros(1)}, tmp_path / "f.pt")
    assert not list(tmp_path.iterdir())
