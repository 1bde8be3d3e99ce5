"""A checkpoint directory cannot run code when a training resumes from it."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinov3.checkpointer import CheckpointError, load_checkpoint, read_manifest, read_tensors, save_checkpoint
from dinov3.checkpointer.manifest import digest_file


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


class Holder:
    """Saves a trap as an entry of its own."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def state_dict(self) -> dict[str, Any]:
        return {"content": self.content}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.content = state["content"]


def renew_manifest(directory: Path) -> None:
    """What somebody who replaces a file can do as well."""
    manifest = read_manifest(directory)
    manifest["files"] = {name: digest_file(directory / name) for name in manifest["files"]}
    (directory / "checkpoint.json").write_text(json.dumps(manifest))


def test_code_in_the_index_is_not_run(tmp_path: Path) -> None:
    model, directory = nn.Linear(2, 2), tmp_path / "1"
    save_checkpoint(directory, iteration=1, model=model)
    (directory / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    renew_manifest(directory)
    for load in (lambda: load_checkpoint(directory, model=model), lambda: read_tensors(directory)):
        with pytest.raises(CheckpointError, match=r"\.metadata is not the index .*\.mkdir, which could run code"):
            load()
    assert not (tmp_path / "sprung").exists()


def test_code_in_an_entry_is_not_run(tmp_path: Path) -> None:
    model, directory = nn.Linear(2, 2), tmp_path / "1"
    save_checkpoint(directory, iteration=1, model=model, extra=Holder(Trap(tmp_path / "sprung")))
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(CheckpointError, match=r"'extra\.content' holds more than plain data: it refers to \S+\.mkdir,"):
        load_checkpoint(directory, model=model, extra=Holder(None))
    assert not (tmp_path / "sprung").exists()


def test_plain_data_comes_back(tmp_path: Path) -> None:
    content = {"numbers": [1, 2.5, True, None], "text": "äöü", "tensor": torch.tensor([1.0])}
    save_checkpoint(tmp_path / "1", iteration=1, model=nn.Linear(2, 2), extra=Holder(content))
    loaded = Holder(None)
    load_checkpoint(tmp_path / "1", model=nn.Linear(2, 2), extra=loaded)
    assert loaded.content["numbers"] == [1, 2.5, True, None] and loaded.content["text"] == "äöü"
    assert torch.equal(loaded.content["tensor"], content["tensor"])
