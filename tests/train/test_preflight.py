"""What is checked before a training begins: that the disk can hold its checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from dinov3.train.preflight import check_disk


def test_disk_must_hold_two_checkpoints_with_the_moments_of_what_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained, frozen = nn.Linear(1024, 1024, bias=False), nn.Linear(512, 1024, bias=False).requires_grad_(False)
    one_checkpoint = 4 * (3 * 1024 * 1024 + 512 * 1024)
    model = nn.ModuleList([trained, frozen])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * one_checkpoint))
    check_disk(model, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * one_checkpoint - 1))
    with pytest.raises(RuntimeError, match=r"2 checkpoints need about 0\.0 GiB.*another --output-dir"):
        check_disk(model, tmp_path)
