"""The self-supervised method and its training loop; names load on first use, so that `import dinov3.train` is cheap."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "MultiDistillationMetaArch": "dinov3.train.multidist_meta_arch",
    "SSLMetaArch": "dinov3.train.ssl_meta_arch",
    "get_args_parser": "dinov3.train.train",
    "main": "dinov3.train.train",
}

__all__ = ["MultiDistillationMetaArch", "SSLMetaArch", "get_args_parser", "main"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
