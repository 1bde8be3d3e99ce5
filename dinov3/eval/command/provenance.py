"""What a results file says about where its figures come from."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from typing import Any

import torch

from dinov3 import distributed
from dinov3.distributed import runtime
from dinov3.utils import get_sha

#: Installed packages whose version may change a figure.
PACKAGES = ("numpy", "pillow", "scikit-learn", "faiss-cpu")


def provenance(
    config: Any, model: str, datasets: Mapping[str, Any], autocast_dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """A description of an evaluation.

    Args:
        config: a dataclass, all of its settings.
        model: what was evaluated.
        datasets: names and sizes.
        autocast_dtype: what the model ran in.
        seconds: how long it took.

    Returns:
        Plain values, as JSON has them.
    """
    return {
        "config": plain(asdict(config)),
        "model": model,
        "datasets": dict(datasets),
        "processes": distributed.get_world_size(),
        "device": str(runtime.device()),
        "autocast_dtype": str(autocast_dtype),
        "versions": _versions(),
        "seconds": round(seconds, 2),
    }


def plain(value: Any) -> Any:
    """Nested values with enumerations by name, as they can be given again, and all sequences lists."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _versions() -> dict[str, str]:
    versions = {"code": get_sha(), "python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
