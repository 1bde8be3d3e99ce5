"""Features that are too large for memory lie in a file, which is said, and all comes out as it does in memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dinov3.data import make_dataset
from dinov3.eval import knn, log_regression
from dinov3.eval.classification.config import TransformConfig
from dinov3.eval.classification.data import make_transform
from dinov3.eval.classification.knn_module import KnnModule
from dinov3.eval.features.cache import IN_MEMORY, FeatureRows, FeaturesConfig, FeatureStore
from dinov3.eval.features.extraction import (
    extract_cached,
    extract_rows,
    join_rows,
    make_enumerated_loader,
    take_rows,
)

from . import real_data, toy

CPU = torch.device("cpu")


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor is a map of a file."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return inode != "0"
    return False


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Maps everything above 1000 bytes: 20 rows of 12."""
    return FeatureStore(tmp_path / "store", 1000 / 2**20, keeps_entries=False)


def extract(dataset: Any, store: FeatureStore) -> FeatureRows:
    return extract_rows(nn.Identity(), make_enumerated_loader(dataset, 16, 0), store=store)


def test_matrix_is_in_memory_up_to_the_budget(store: FeatureStore) -> None:
    assert not is_mapped(store.new_matrix(20, 12, CPU)) and not is_mapped(IN_MEMORY.new_matrix(2000, 12, CPU))
    mapped = store.new_matrix(21, 12, CPU)
    assert is_mapped(mapped) and mapped.shape == (21, 12)
    mapped.fill_(3.0)
    assert float(mapped.sum()) == 21 * 12 * 3
    assert not list(store.directory.iterdir())  # its file has no name: nothing stays behind


def test_extraction_says_so_and_gives_the_same_rows(store: FeatureStore, caplog: pytest.LogCaptureFixture) -> None:
    dataset = toy.Vectors("train", 90)
    want = extract(dataset, IN_MEMORY)
    with caplog.at_level("WARNING", logger="dinov3"):
        rows = extract(dataset, store)
    assert is_mapped(rows.features) and not is_mapped(want.features)
    for found, expected in zip(rows, want, strict=True):
        assert torch.equal(found, expected)
    assert "more than features.memory_budget_mb=" in caplog.text and f"a file in {store.directory}" in caplog.text
    assert caplog.text.count("memory_budget_mb") == 1


def test_batches_without_a_foreseen_number_are_taken(store: FeatureStore) -> None:
    dataset = toy.Vectors("train", 90)
    for chosen in (IN_MEMORY, store):
        batches = (batch for batch in make_enumerated_loader(dataset, 16, 0))
        rows = extract_rows(nn.Identity(), batches, store=chosen)
        assert torch.equal(rows.features, extract(dataset, IN_MEMORY).features)


def test_parts_and_sums_of_large_matrices_are_mapped_too(store: FeatureStore) -> None:
    features = torch.randn(60, 12)
    places = torch.arange(0, 60, 2)
    taken, joined = take_rows(features, places, store), join_rows([features, features[:5]], store)
    assert is_mapped(taken) and torch.equal(taken, features[places])
    assert is_mapped(joined) and torch.equal(joined, torch.cat([features, features[:5]]))


def test_error_about_a_full_disk_says_what_to_do(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10))  # type: ignore
    with pytest.raises(
        OSError, match=r"features of 0\.0 GB are larger than .*memory_budget_mb.*0\.0 GB free.*cache_dir"
    ):
        extract(toy.Vectors("train", 90), store)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and images of faces and other things."""
    root = tmp_path_factory.mktemp("large")
    real_data.write_run(root / "run")
    real_data.write_faces(root / "faces")
    return root


def arguments(module: Any, faces: Path, out: Path) -> list[str]:
    return [
        f"model.pretrained_weights={faces}/run",
        *real_data.size_settings(),
        *(f"{key}=ImageFolder:root={faces}/faces/{part}" for key, part in SETS.items()),
        f"output_dir={out}",
        f"features.cache_dir={out}/cache",
        "save_results=true",
        *(["train.max_train_iters=2"] if module is log_regression else []),
    ]


SETS = {"train.dataset": "train", "eval.test_dataset": "test"}


@pytest.mark.parametrize(
    "module, more", [(knn, []), (log_regression, ["few_shot.enable=true", "few_shot.k_or_percent=20"])]
)
def test_evaluations_give_the_same_files(
    module: Any, more: list[str], faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for name, budget in (("memory", []), ("file", ["features.memory_budget_mb=0.01"]), ("both", ["--no-cache"])):
        settings = [
            *budget,
            *(["features.memory_budget_mb=0.01", "train.memory_budget_mb=0.01"] if name == "both" else []),
        ]
        capsys.readouterr()
        assert module.main([*arguments(module, faces, tmp_path / name), *more, *settings]) == 0
        assert ("they lie in a file" in capsys.readouterr().out) is (name != "memory")
        files = sorted(path for path in (tmp_path / name).iterdir() if path.suffix in (".csv", ".npy"))
        outputs.append(files)
    for other in outputs[1:]:
        assert [path.name for path in other] == [path.name for path in outputs[0]]
        for path, want in zip(other, outputs[0], strict=True):
            if path.suffix == ".csv":
                assert path.read_text() == want.read_text()
            else:
                np.testing.assert_allclose(np.load(path), np.load(want), atol=1e-6)
    assert not (tmp_path / "both" / "cache").exists() or not list((tmp_path / "both" / "cache").iterdir())


def test_entries_of_the_cache_are_mapped(faces: Path, tmp_path: Path) -> None:
    transform = make_transform(TransformConfig(16, 16))
    dataset = make_dataset(dataset_str=f"ImageFolder:root={faces}/faces/test", transform=transform)
    config = FeaturesConfig(cache_dir=str(tmp_path), memory_budget_mb=0.001)
    model = MeanColour()
    want = extract_cached(model, dataset, IN_MEMORY, batch_size=16, num_workers=0)
    for _ in range(2):  # stored, then found
        rows = extract_cached(model, dataset, config.make_store(), batch_size=16, num_workers=0)
        assert is_mapped(rows.features) and torch.equal(rows.features, want.features)
        (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
        assert f"{entry}/features.npy" in Path("/proc/self/maps").read_text()  # the disk holds no second copy
        rows.features[0] = 7.0  # changes no file
    assert np.load(entry / "features.npy").max() < 7


class MeanColour(nn.Module):
    """A row of every image, in some colours."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=2).flatten(1)


def test_search_takes_features_from_where_they_are(store: FeatureStore) -> None:
    generator = torch.Generator().manual_seed(0)
    features, queries = torch.randn(300, 12, generator=generator), torch.randn(40, 12, generator=generator)
    mapped = join_rows([features], store)
    options: dict[str, Any] = {
        "train_labels": torch.arange(300) % 7,
        "device": "cpu",
        "ks": [1, 20],
        "T": 0.07,
        "num_classes": 7,
        "memory_budget_mb": 0.1,
    }
    streamed = KnnModule(train_features=mapped, stream=True, **options)
    assert is_mapped(streamed.features)
    want = KnnModule(train_features=features, **options)(queries)
    for k, scores in streamed(queries).items():
        assert torch.equal(scores, want[k])
