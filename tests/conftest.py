"""What all tests share: they run on the CPU, also where there is a GPU, but for those marked `gpu`, which need one."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("DINOV3_DEVICE", "cpu")  # inherited by the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
