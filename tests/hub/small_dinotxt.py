"""The published model of images and texts in the size of tests, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.hub import dinotxt
from dinov3.hub.architectures import PUBLISHED, PublishedViT
from dinov3.hub.dinotxt import dinov3_vitl16_dinotxt_tet1280d20h24l
from tests.heads.tiny import randomise_

BACKBONE = "visual_model.backbone."


def make_published_dinotxt_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's entry build a small model."""
    hashes = {"LVD1689M": "8aa4cbdd", "SAT493M": "eadcf0ff"}
    monkeypatch.setitem(PUBLISHED, "dinov3_vitl16", PublishedViT(32, 2, 2, 4, "mlp", hashes))
    small = {"dim": 16, "num_heads": 2, "num_layers": 1}
    monkeypatch.setattr(dinotxt, "TEXT_TRANSFORMER", dinotxt.TEXT_TRANSFORMER | small)


def write_dinotxt(directory: Path) -> dict[str, Any]:
    """Write a filled model of the entry as its two files; return their paths and the state dict."""
    torch.manual_seed(0)
    model = dinov3_vitl16_dinotxt_tet1280d20h24l(pretrained=False)[0]
    randomise_(model)
    state = model.state_dict()
    torch.save(model.visual_model.backbone.state_dict(), directory / "backbone.pth")
    torch.save({name: entry for name, entry in state.items() if not name.startswith(BACKBONE)}, directory / "head.pth")
    return {"backbone": directory / "backbone.pth", "head": directory / "head.pth", "state": state}
