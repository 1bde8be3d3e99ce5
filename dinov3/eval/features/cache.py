"""Features on disk, so that several evaluations of one model, or one evaluation run again, extract them once.

An entry is a directory named by a digest of everything that its rows depend on: the model's code names, settings and
weights, the precision that it runs in, the images (files, sizes, times of change), their order and their transform.

Notable:
- On top of that, an entry is only used if the model still returns the stored features for three of its images, so the
  entry of another model is never used, whatever the digest might miss.
- An entry appears complete or not at all. Any number of processes can read it, each only its own rows.
- What cannot be described, such as datasets that are not files or transforms without a name, is not stored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate

from dinov3 import distributed
from dinov3.configs.settings import key
from dinov3.eval.features.extraction import FeatureRows, Spill, extract_rows, make_enumerated_loader, model_device
from dinov3.utils.files import publish_directory, temporary_beside

logger = logging.getLogger("dinov3")

CACHE_VARIABLE = "DINOV3_FEATURE_CACHE"
FORMAT = 1
FEATURES_FILE, TARGETS_FILE, DESCRIPTION_FILE = "features.npy", "targets.npy", "description.json"
# Largest difference between stored and new features of an image, relative to the largest feature: another number of
# threads changes float32 features less than that. The unit of bfloat16 is 8e-3.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
SHARE_OF_FREE_SPACE = 0.5
ABANDONED_AFTER = 24 * 3600.0  # seconds
_ADDRESS = re.compile(r" at 0x[0-9a-f]+|<function|<lambda>")


@dataclass
class FeaturesConfig:
    """Where to keep features."""

    cache: bool = key(True, "keep features on disk for the next evaluation; --no-cache sets it to false")
    cache_dir: str | None = key(None, f"where to keep features; null: ${CACHE_VARIABLE} or ~/.cache/dinov3/features")
    memory_budget_mb: float = key(8192, "larger features of a dataset lie in a file in cache_dir, not in memory")

    def __post_init__(self) -> None:
        if self.memory_budget_mb < 0:
            raise ValueError(f"features.memory_budget_mb={self.memory_budget_mb}: expected 0 or more")

    def make_cache(self) -> FeatureCache | None:
        """Return the cache, or None if it is turned off.

        Raises:
            OSError: `cache_dir` is given but cannot be written.
        """
        if not self.cache:
            return None
        if self.cache_dir is not None:
            _check_writable(self._directory())
        return FeatureCache(self._directory())

    def make_spill(self) -> Spill:
        """Return where features go that are too large for memory."""
        return Spill(self._directory(), int(self.memory_budget_mb * 2**20))

    def _directory(self) -> Path:
        return Path(self.cache_dir or os.environ.get(CACHE_VARIABLE) or "~/.cache/dinov3/features").expanduser()


class FeatureCache:
    """Feature matrices in a directory.

    Args:
        directory: created when the first entry is stored.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def find(self, description: dict[str, Any] | None, model: nn.Module, dataset: Any) -> Path | None:
        """Return the entry of a description if the model still returns its features; every process must call it."""
        path = None if description is None else self._path_of(description)
        usable = path is not None and path.is_dir() and self._fits(path, model, dataset)
        return path if all(distributed.all_gather_objects(usable)) else None

    def store(self, description: dict[str, Any] | None, rows: FeatureRows, n_rows: int) -> Path | None:
        """Write the rows of all processes; every process must call it.

        Args:
            description: from `describe`.
            rows: those of this process.
            n_rows: of all processes.

        Returns:
            The entry, or None if it could not be described or written, for a reason that is logged.
        """
        if not all(distributed.all_gather_objects(description is not None)):
            logger.info("features are not stored: this dataset, its transform or the model cannot be identified")
            return None
        assert description is not None
        shape = (n_rows, rows.features.shape[1])
        target = self._path_of(description)
        temporary = distributed.broadcast_object(self._begin(target, shape))
        if temporary is None or not self._write_rows(temporary, rows):
            return None
        return self._finish(temporary, target, description, rows, shape)

    def _path_of(self, description: dict[str, Any]) -> Path:
        text = json.dumps(description, sort_keys=True)
        return self.directory / hashlib.sha256(text.encode()).hexdigest()[:32]

    def _fits(self, path: Path, model: nn.Module, dataset: Any) -> bool:
        try:
            features = np.load(path / FEATURES_FILE, mmap_mode="r")
            targets = np.load(path / TARGETS_FILE, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            logger.warning("cached features in %s cannot be read, so they are not used: %s", path, error)
            return False
        if len(features) != len(dataset) or len(targets) != len(dataset):
            return False
        places = sorted({0, len(dataset) // 2, len(dataset) - 1})
        stored = torch.from_numpy(np.array(features[places]))
        computed = _features_of(model, dataset, places)
        bound = TOLERANCE[_precision(model)] * float(stored.abs().max())
        fits = stored.shape == computed.shape and bool((stored - computed).abs().max() <= bound)
        if not fits:
            logger.warning("cached features in %s are not what this model returns, so they are not used", path)
        return fits

    def _begin(self, target: Path, shape: tuple[int, int]) -> Path | None:
        if not distributed.is_main_process():
            return None
        n_bytes = 4 * shape[0] * shape[1]
        temporary = temporary_beside(target)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.directory)
            free = shutil.disk_usage(self.directory).free
            if n_bytes > SHARE_OF_FREE_SPACE * free:
                logger.warning(
                    "features of %.1f GB are not stored: %s has %.1f GB free", n_bytes / 1e9, self.directory, free / 1e9
                )
                return None
            temporary.mkdir()
            np.lib.format.open_memmap(temporary / FEATURES_FILE, mode="w+", dtype=np.float32, shape=shape).flush()
        except OSError as error:
            logger.warning("features are not stored: %s", error)
            shutil.rmtree(temporary, ignore_errors=True)
            return None
        return temporary

    def _write_rows(self, temporary: Path, rows: FeatureRows) -> bool:
        # Each process writes its own rows into one file. On a machine that does not see the file this fails, for all.
        try:
            if len(rows.positions):
                features = np.load(temporary / FEATURES_FILE, mmap_mode="r+")
                features[rows.positions.numpy()] = rows.features.cpu().numpy()
                features.flush()
            failed = None
        except OSError as error:
            failed = str(error)
        failures = [text for text in distributed.all_gather_objects(failed) if text is not None]
        if failures:
            logger.warning("features are not stored: %s", failures[0])
            if distributed.is_main_process():
                shutil.rmtree(temporary, ignore_errors=True)
        return not failures

    def _finish(
        self, temporary: Path, target: Path, description: dict[str, Any], rows: FeatureRows, shape: tuple[int, int]
    ) -> Path:
        parts = distributed.all_gather_objects((rows.positions.numpy(), rows.targets.cpu().numpy()))
        if distributed.is_main_process():
            width = max(part.shape[1:] for _, part in parts)
            targets = np.full((shape[0], *width), -1, dtype=np.int64)
            for positions, part in parts:
                if part.ndim == 1:
                    targets[positions] = part
                else:
                    targets[positions, : part.shape[1]] = part
            np.save(temporary / TARGETS_FILE, targets)
            text = json.dumps(description | {"shape": shape}, indent=2)
            (temporary / DESCRIPTION_FILE).write_text(text + "\n", encoding="utf-8")
            publish_directory(temporary, target)
            logger.info("features stored in %s, %.1f MB", target, 4e-6 * shape[0] * shape[1])
        distributed.barrier()
        return target


def extract_cached(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int,
    num_workers: int,
    cache: FeatureCache | None,
    on_cpu: bool = False,
    collate_fn: Any = None,
    description: str = "features",
    spill: Spill | None = None,
) -> FeatureRows:
    """Return this process's rows of a dataset's features, from the cache or newly stored; every process must call it.

    Args:
        model: returns [B, D] for a batch of images, under the caller's autocast.
        dataset: yields (image, target).
        batch_size: images per step and process.
        num_workers: of the loader.
        cache: None turns it off.
        on_cpu: return features on the CPU instead of the model's device.
        collate_fn: see `make_enumerated_loader`.
        description: of the progress bar.
        spill: for features that are too large for memory; those of the cache are then read from its file.
    """
    device = torch.device("cpu") if on_cpu else model_device(model)
    entry = describe(model, dataset) if cache is not None else None
    path = cache.find(entry, model, dataset) if cache is not None else None
    if path is not None:
        logger.info("%s: read from %s", description, path)
        return read_rows(path, device=device, spill=spill)
    loader = make_enumerated_loader(dataset, batch_size, num_workers, collate_fn)
    rows = extract_rows(model, loader, on_cpu=on_cpu, description=description, spill=spill)
    path = cache.store(entry, rows, len(dataset)) if cache is not None else None
    if path is not None and spill is not None and spill.takes(len(dataset), rows.features.shape[1]):
        # Drops the spilled file, so that the disk holds one copy instead of two.
        return read_rows(path, device=device, spill=spill)
    return rows


def open_features(path: Path) -> tuple[np.ndarray, Tensor]:
    """Return the features of an entry as a copy-on-write memory map (float32 [N, D]), and its targets."""
    return np.load(path / FEATURES_FILE, mmap_mode="c"), torch.from_numpy(np.load(path / TARGETS_FILE))


def read_rows(path: Path, *, device: torch.device, spill: Spill | None = None) -> FeatureRows:
    """Read this process's share of an entry, every `world size`-th row, or map it on the CPU if `spill` takes all."""
    features, targets = open_features(path)
    share = slice(distributed.get_rank(), None, distributed.get_world_size())
    positions = torch.arange(len(features))[share]
    if spill is not None and spill.takes(*features.shape):
        return FeatureRows(torch.from_numpy(features[share]), targets[share], positions)
    rows = torch.from_numpy(np.array(features[share]))
    return FeatureRows(rows.to(device), targets[share].to(device), positions)


def describe(model: nn.Module, dataset: Any) -> dict[str, Any] | None:
    """Describe what the features of a model depend on; return None if that cannot be described.

    Args:
        model: as it is called, with its wrappers, under the autocast that it runs in.
        dataset: images that are files (it has `root` and `get_image_relpath`), or a subset of them.
    """
    images = describe_images(dataset)
    settings = repr(model)
    if images is None or _ADDRESS.search(settings):
        return None
    return {
        "format": FORMAT,
        "model": hashlib.sha256(settings.encode()).hexdigest(),
        "weights": weights_digest(model),
        "precision": str(_precision(model)),
        "images": images,
    }


def describe_images(dataset: Any) -> dict[str, Any] | None:
    """Describe the images of a dataset, their order and transform; return None if they cannot be described."""
    if isinstance(dataset, Subset):
        inner = describe_images(dataset.dataset)
        chosen = hashlib.sha256(np.asarray(dataset.indices, dtype=np.int64).tobytes()).hexdigest()
        return None if inner is None else inner | {"subset": [chosen, inner.get("subset")]}
    transform = repr(getattr(dataset, "transforms", None))
    if not hasattr(dataset, "get_image_relpath") or not hasattr(dataset, "root") or _ADDRESS.search(transform):
        return None
    root = os.path.realpath(str(dataset.root))
    digest = hashlib.sha256()
    try:
        for index in range(len(dataset)):
            name = dataset.get_image_relpath(index)
            entry = os.stat(os.path.join(root, name))
            digest.update(f"{name}\0{entry.st_size}\0{entry.st_mtime_ns}\n".encode())
    except (OSError, NotImplementedError):
        return None
    labels = dataset.get_targets() if hasattr(dataset, "get_targets") else None
    digest.update(repr(labels if labels is None else np.asarray(labels, dtype=object).tolist()).encode())
    return {
        "type": type(dataset).__name__,
        "root": root,
        "files": digest.hexdigest(),
        "count": len(dataset),
        "transform": transform,
    }


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in _all_tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # Includes buffers that are not saved, because the model computes with them too.
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _check_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(
            f"features.cache_dir={directory} cannot be written ({error}): choose another directory, or --no-cache"
        ) from error


def _remove_abandoned(directory: Path) -> None:
    # Left by killed processes; younger ones may be in use at this moment.
    for entry in directory.glob(".tmp-*"):
        if time.time() - entry.stat().st_mtime > ABANDONED_AFTER:
            shutil.rmtree(entry, ignore_errors=True)


def _precision(model: nn.Module) -> torch.dtype:
    declared = getattr(model, "autocast_dtype", None)
    if declared is not None:
        return declared
    device = model_device(model).type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


@torch.no_grad()
def _features_of(model: nn.Module, dataset: Any, places: list[int]) -> Tensor:
    model.eval()
    images = default_collate([dataset[place][0] for place in places])
    return model(images.to(model_device(model))).float().cpu()
