"""Features on disk: found again for the same model, images and settings, and for nothing else."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from dinov3.data.datasets import ImageFolder
from dinov3.eval.classification.data import SubsetEx
from dinov3.eval.classification.knn_config import KnnEvalConfig
from dinov3.eval.command.config import args_dict_to_dataclass, cli_parser
from dinov3.eval.features import cache as feature_cache
from dinov3.eval.features.cache import IN_MEMORY, FeaturesConfig, FeatureStore
from dinov3.eval.features.extraction import extract_cached
from tests.multiprocess import run_ranks


def to_tensor(size: int = 4) -> v2.Compose:
    return v2.Compose([v2.ToImage(), v2.Resize(size), v2.ToDtype(torch.float32, scale=True)])


def write_images(root: Path, count: int = 7) -> Path:
    rng = np.random.default_rng(0)
    for number in range(count):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).save(path, compress_level=0)
    return root


class Model(nn.Module):
    """A linear layer that counts images, times a factor that is in no parameter."""

    def __init__(self, seed: int = 0, factor: float = 1.0) -> None:
        super().__init__()
        self.fc = nn.Linear(48, 5)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        self.factor = factor
        self.n_seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.n_seen += len(images)
        return self.factor * self.fc(images.flatten(1))


def folder(root: Path, transform: Any = None) -> ImageFolder:
    return ImageFolder(root=str(root), transform=transform or to_tensor())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "cache")


def extract(store: FeatureStore, dataset: Any, model: Model) -> tuple[Tensor, Tensor, bool]:
    """Features, labels, and whether they were found."""
    before = model.n_seen
    rows = extract_cached(model, dataset, store, batch_size=3, num_workers=0)
    assert torch.equal(rows.positions, torch.arange(len(dataset)))
    return rows.features, rows.targets, model.n_seen - before < len(dataset)


def test_features_are_found_again(images: Path, store: FeatureStore) -> None:
    want = extract(IN_MEMORY, folder(images), Model())
    for is_found in (False, True, True):
        got = extract(store, folder(images), Model())
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert got[2] is is_found


def other_weights(images: Path) -> tuple[Any, Model]:
    return folder(images), Model(seed=1)


def other_factor(images: Path) -> tuple[Any, Model]:
    return folder(images), Model(factor=1.5)


def other_transform(images: Path) -> tuple[Any, Model]:
    flipped = v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(p=1.0), to_tensor()])
    return folder(images, flipped), Model()


def other_subset(images: Path) -> tuple[Any, Model]:
    return SubsetEx(folder(images), [3, 1, 0, 2, 4, 5, 6]), Model()


def changed_image(images: Path) -> tuple[Any, Model]:
    path = images / "a" / "2.png"  # not among those that are compared
    size = path.stat().st_size
    Image.new("RGB", (4, 4), (255, 0, 0)).save(path, compress_level=0)
    assert path.stat().st_size == size
    os.utime(path, (1, 1))
    return folder(images), Model()


def renamed_class(images: Path) -> tuple[Any, Model]:
    (images / "b").rename(images / "0")
    return folder(images), Model()


@pytest.mark.parametrize(
    "change", [other_weights, other_factor, other_transform, other_subset, changed_image, renamed_class]
)
def test_features_of_something_else_are_not_used(change: Any, images: Path, store: FeatureStore) -> None:
    extract(store, folder(images), Model())
    dataset, model = change(images)
    want = extract(IN_MEMORY, dataset, model)
    got = extract(store, dataset, model)
    assert not got[2]
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_precision_is_part_of_an_entry(images: Path, store: FeatureStore) -> None:
    extract(store, folder(images), Model())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [extract(store, folder(images), Model())[2] for _ in range(2)] == [False, True]


def test_entry_of_another_model_under_the_same_name_is_not_used(
    images: Path, store: FeatureStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "weights_digest", lambda model: "always the same")
    extract(store, folder(images), Model())
    want = extract(IN_MEMORY, folder(images), Model(seed=1))
    with caplog.at_level("WARNING", logger="dinov3"):
        got = extract(store, folder(images), Model(seed=1))
    assert torch.equal(got[0], want[0]) and not got[2]
    assert any("not what this model returns" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("damage", ["cut", "missing", "text", "empty"])
def test_damaged_entry_is_replaced(damage: str, images: Path, store: FeatureStore) -> None:
    extract(store, folder(images), Model())
    file = next(store.directory.rglob("features.npy"))
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"cut": file.read_bytes()[:150], "text": b"no array", "empty": b""}[damage])
    assert [extract(store, folder(images), Model())[2] for _ in range(2)] == [False, True]


def test_nothing_is_left_when_writing_fails(
    images: Path, store: FeatureStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(feature_cache.np.lib.format, "open_memmap", fail)
    with caplog.at_level("WARNING", logger="dinov3"):
        extract(store, folder(images), Model())
    assert any("disk full" in record.getMessage() for record in caplog.records)
    assert list(store.directory.iterdir()) == []


def test_what_a_killed_process_left_is_removed_in_time(images: Path, store: FeatureStore) -> None:
    for name, age in ((".tmp-x-01234567", 1e6), (".tmp-y-01234567", 0)):
        (store.directory / name).mkdir(parents=True)
        os.utime(store.directory / name, (time.time() - age,) * 2)
    extract(store, folder(images), Model())
    assert [path.name for path in store.directory.glob(".tmp*")] == [".tmp-y-01234567"]


def test_disk_is_not_filled(images: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "SHARE_OF_FREE_SPACE", 0.0)
    extract(store, folder(images), Model())
    assert list(store.directory.iterdir()) == []


def test_what_cannot_be_described_is_not_stored(images: Path, store: FeatureStore) -> None:
    extract(store, folder(images, lambda image: to_tensor()(image)), Model())
    assert not store.directory.exists()


def test_flag_turns_the_cache_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ["model.dino_hub=dinov3_vits16", "train.dataset=A", "eval.test_dataset=B"]

    def made(*more: str) -> FeatureStore:
        return args_dict_to_dataclass(cli_parser([*tokens, *more]), KnnEvalConfig, False)[0].features.make_store()

    chosen = made(f"features.cache_dir={tmp_path}")
    assert chosen.keeps_entries and chosen.directory == tmp_path
    monkeypatch.setenv("DINOV3_FEATURE_CACHE", "/somewhere")
    default = FeaturesConfig().make_store()
    assert default.keeps_entries and default.directory == Path("/somewhere")
    turned_off = made("--no-cache")
    assert not turned_off.keeps_entries and turned_off.directory == Path("/somewhere")


def test_cache_that_is_turned_off_is_neither_read_nor_written(images: Path, store: FeatureStore) -> None:
    turned_off = dataclasses.replace(store, keeps_entries=False)
    extract(turned_off, folder(images), Model())
    assert not store.directory.exists()
    extract(store, folder(images), Model())
    assert not extract(turned_off, folder(images), Model())[2]


def extract_in_ranks(rank: int, world_size: int, images: Path, directory: Path) -> tuple[Tensor, Tensor, int]:
    model = Model()
    rows = extract_cached(model, folder(images), FeatureStore(directory), batch_size=2, num_workers=0)
    return rows.features, rows.positions, model.n_seen


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_share_entries_whatever_their_number(images: Path, store: FeatureStore) -> None:
    want, _, _ = extract(IN_MEMORY, folder(images), Model())
    n_probed = 3
    first = run_ranks(extract_in_ranks, 2, images, store.directory)
    again = run_ranks(extract_in_ranks, 3, images, store.directory)
    for ranks in (first, again):
        features = torch.zeros_like(want)
        for rows, positions, _ in ranks:
            features[positions] = rows
        torch.testing.assert_close(features, want)
    assert all(n_seen <= n_probed for _, _, n_seen in again)
    assert extract(store, folder(images), Model())[2]
