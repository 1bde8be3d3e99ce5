"""A store of features: those that fit into memory stay there, and the disk keeps all for the next evaluation.

Several evaluations of one model, or one evaluation run again, extract them once: an entry on disk is a directory named
by a digest of everything that its rows depend on: the model's code names, settings and weights, the precision that it
runs in, the images (files, sizes, times of change), their order and their transform.

Notable:
- On top of that, an entry is only used if the model still returns the stored features for three of its images, so the
  entry of another model is never used, whatever the digest might miss.
- An entry appears complete or not at all. Any number of processes can read it, each only its own rows.
- Matrices that are too large for memory are mapped from a file, of an entry or without a name: reading them block by
  block needs no more memory than a block.
- What cannot be described, such as datasets that are not files or transforms without a name, is not stored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate

from dinov3 import distributed
from dinov3.configs.settings import key
from dinov3.distributed import runtime
from dinov3.utils.files import explaining_full_disk, publish_directory, temporary_beside

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

    def make_store(self, *, memory_budget_mb: float | None = None) -> FeatureStore:
        """Return the store of an evaluation.

        Args:
            memory_budget_mb: infinity if the caller bounds the memory itself. Default: the setting.

        Raises:
            OSError: features are kept in a given `cache_dir`, which cannot be written.
        """
        directory = Path(self.cache_dir or os.environ.get(CACHE_VARIABLE) or "~/.cache/dinov3/features").expanduser()
        if self.cache and self.cache_dir is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=directory):
                    pass
            except OSError as error:
                raise OSError(
                    f"features.cache_dir={directory} cannot be written ({error}): choose another directory, or "
                    "--no-cache"
                ) from error
        budget = self.memory_budget_mb if memory_budget_mb is None else memory_budget_mb
        return FeatureStore(directory, budget, self.cache)


class FeatureRows(NamedTuple):
    """Some rows of a dataset's features.

    Attributes:
        features: float32 [n, D].
        targets: int64 [n], or [n, L].
        positions: int64 [n] on the CPU, in the dataset, ascending and all different.
    """

    features: Tensor
    targets: Tensor
    positions: Tensor


@dataclass(frozen=True)
class FeatureStore:
    """Memory or disk for the features of an evaluation.

    Attributes:
        directory: of entries, and of unnamed files that vanish with the process; created when it is first needed.
        memory_budget_mb: matrices above it are mapped from a file, even if no entries are kept.
        keeps_entries: whether features are read from and written to entries, which later evaluations find.
    """

    directory: Path
    memory_budget_mb: float = math.inf
    keeps_entries: bool = True

    def is_too_large(self, n_rows: int, n_columns: int) -> bool:
        """Return whether a float32 matrix is too large for memory."""
        return 4 * n_rows * n_columns > self.memory_budget_mb * 2**20

    def new_matrix(self, n_rows: int, n_columns: int, device: torch.device, *, total_rows: int | None = None) -> Tensor:
        """Make a float32 matrix of undefined values, on the device or, if too large for memory, mapped from a file.

        Args:
            n_rows: rows of the matrix.
            n_columns: columns of the matrix.
            device: of a matrix in memory; a mapped one is on the CPU.
            total_rows: rows of the matrix of which this is a part, if that one's size decides.

        Raises:
            OSError: the disk is too small, or the directory cannot be written.
        """
        if not self.is_too_large(n_rows if total_rows is None else total_rows, n_columns):
            return torch.empty(n_rows, n_columns, device=device)
        n_bytes = 4 * n_rows * n_columns
        try:
            self._check_space(n_bytes)
            with tempfile.TemporaryFile(dir=self.directory) as file:
                file.truncate(n_bytes)
                return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="r+", shape=(n_rows, n_columns)))
        except OSError as error:
            raise OSError(
                f"features of {n_bytes / 1e9:.1f} GB are larger than features.memory_budget_mb="
                f"{self.memory_budget_mb:.0f} and cannot be put on the disk ({error}): set a larger budget, or a "
                "features.cache_dir on a larger disk"
            ) from error

    def find(self, description: dict[str, Any] | None, model: nn.Module, dataset: Any) -> Path | None:
        """Return the entry of a description if the model still returns its features; every process must call it."""
        path = None if description is None else self._path_of(description)
        usable = path is not None and path.is_dir() and _is_valid(path, model, dataset)
        return path if all(distributed.all_gather_objects(usable)) else None

    def read(self, path: Path, device: torch.device) -> FeatureRows:
        """Read this process's share of an entry, every `world size`-th row; map it on the CPU if all are too large."""
        features = np.load(path / FEATURES_FILE, mmap_mode="c")
        targets = torch.from_numpy(np.load(path / TARGETS_FILE))
        share = slice(distributed.get_rank(), None, distributed.get_world_size())
        positions = torch.arange(len(features))[share]
        if self.is_too_large(*features.shape):
            return FeatureRows(torch.from_numpy(features[share]), targets[share], positions)
        rows = torch.from_numpy(np.array(features[share]))
        return FeatureRows(rows.to(device), targets[share].to(device), positions)

    def write(self, description: dict[str, Any] | None, rows: FeatureRows, all_targets: Tensor) -> Path | None:
        """Make an entry of the rows of all processes; every process must call it.

        Args:
            description: from `describe`.
            rows: those of this process.
            all_targets: those of all processes, in the order of the dataset.

        Returns:
            The entry, or None if it could not be described or written, for a reason that is logged.
        """
        if not all(distributed.all_gather_objects(description is not None)):
            logger.info("features are not stored: this dataset, its transform or the model cannot be identified")
            return None
        assert description is not None
        shape = (len(all_targets), rows.features.shape[1])
        n_bytes = 4 * shape[0] * shape[1]
        target = self._path_of(description)
        temporary: Path = distributed.broadcast_object(temporary_beside(target))

        def begin() -> None:
            if distributed.is_main_process():
                # Left by killed processes; younger ones may be in use at this moment.
                for entry in self.directory.glob(".tmp-*"):
                    if time.time() - entry.stat().st_mtime > ABANDONED_AFTER:
                        shutil.rmtree(entry, ignore_errors=True)
                self._check_space(n_bytes, SHARE_OF_FREE_SPACE)
                temporary.mkdir()
                np.lib.format.open_memmap(temporary / FEATURES_FILE, mode="w+", dtype=np.float32, shape=shape).flush()

        def add_rows() -> None:
            # Each process writes its own rows into one file. On a machine that does not see the file this fails.
            if len(rows.positions):
                features = np.load(temporary / FEATURES_FILE, mmap_mode="r+")
                features[rows.positions.numpy()] = rows.features.cpu().numpy()
                features.flush()

        def publish() -> None:
            if distributed.is_main_process():
                np.save(temporary / TARGETS_FILE, all_targets.long().cpu().numpy())
                text = json.dumps(description | {"shape": shape}, indent=2)
                (temporary / DESCRIPTION_FILE).write_text(text + "\n", encoding="utf-8")
                publish_directory(temporary, target)
                logger.info("features stored in %s, %.1f MB", target, 1e-6 * n_bytes)

        for step in (begin, add_rows, publish):
            try:
                with explaining_full_disk(temporary):
                    step()
                failure = None
            except OSError as error:
                failure = str(error)
            # Also holds every process until all have finished the step.
            failures = [text for text in distributed.all_gather_objects(failure) if text is not None]
            if failures:
                if distributed.is_main_process():
                    logger.warning("features of %.1f GB are not stored: %s", n_bytes / 1e9, failures[0])
                    shutil.rmtree(temporary, ignore_errors=True)
                return None
        return target

    def _path_of(self, description: dict[str, Any]) -> Path:
        text = json.dumps(description, sort_keys=True)
        return self.directory / hashlib.sha256(text.encode()).hexdigest()[:32]

    def _check_space(self, n_bytes: int, share: float = 1.0) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        if n_bytes > share * free:
            raise OSError(f"{self.directory} has {free / 1e9:.1f} GB free")


# Keeps no entries and has no limit, so it never touches the directory.
IN_MEMORY = FeatureStore(Path(), keeps_entries=False)


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
            digest.update(f"{name}\0{entry.st_size}\0{entry.st_mtime_ns}\n".encode(errors="surrogateescape"))
    except (OSError, NotImplementedError):
        return None
    labels = dataset.get_targets() if hasattr(dataset, "get_targets") else None
    digest.update(
        repr(labels if labels is None else np.asarray(labels, dtype=object).tolist()).encode(errors="surrogateescape")
    )
    return {
        "type": type(dataset).__name__,
        "root": root,
        "files": digest.hexdigest(),
        "count": len(dataset),
        "transform": transform,
        "reading": repr(getattr(dataset, "reading", None)),
    }


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    # Includes buffers that are not saved, because the model computes with them too.
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's parameters, or this process's device if it has none."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return runtime.device() if tensor is None else tensor.device


def _is_valid(path: Path, model: nn.Module, dataset: Any) -> bool:
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
    model.eval()
    with torch.no_grad():
        images = default_collate([dataset[place][0] for place in places])
        computed = model(images.to(model_device(model))).float().cpu()
    bound = TOLERANCE[_precision(model)] * float(stored.abs().max())
    is_valid = stored.shape == computed.shape and bool((stored - computed).abs().max() <= bound)
    if not is_valid:
        logger.warning("cached features in %s are not what this model returns, so they are not used", path)
    return is_valid


def _precision(model: nn.Module) -> torch.dtype:
    declared = getattr(model, "autocast_dtype", None)
    if declared is not None:
        return declared
    device = model_device(model).type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
