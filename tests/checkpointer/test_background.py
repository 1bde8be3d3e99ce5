"""Saving beside the training."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.checkpointer import (
    BackgroundSaver,
    CheckpointError,
    find_all_checkpoints,
    latest_valid_checkpoint,
    load_checkpoint,
    read_manifest,
    saving,
)

from . import toy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The thread that saves stops before the manifest until this is set."""
    gate = threading.Event()
    write = saving.write_manifest

    def wait_and_write(*args: Any, **kwargs: Any) -> None:
        assert gate.wait(60)
        write(*args, **kwargs)

    monkeypatch.setattr(saving, "write_manifest", wait_and_write)
    return gate


def test_checkpoint_holds_what_was_there_when_the_save_began(tmp_path: Path, gate: threading.Event) -> None:
    model, optimizer = toy.make()
    toy.train(model, optimizer, range(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saver = BackgroundSaver()
    saver.start(tmp_path / "2", iteration=2, model=model, optimizer=optimizer, metadata={"a": 1})
    toy.train(model, optimizer, range(3, 6))
    assert saver.is_running and find_all_checkpoints(tmp_path) == []
    gate.set()
    saver.wait()
    assert not saver.is_running

    assert latest_valid_checkpoint(tmp_path, verify=True) == tmp_path / "2"
    assert read_manifest(tmp_path / "2")["contents"] == ["iteration", "model", "optimizer"]
    assert read_manifest(tmp_path / "2")["metadata"] == {"a": 1}
    resumed, resumed_optimizer = toy.make(seed=1)
    assert load_checkpoint(tmp_path / "2", model=resumed, optimizer=resumed_optimizer) == 2
    toy.assert_equal(resumed.state_dict(), before)
    toy.train(resumed, resumed_optimizer, range(3, 6))
    toy.assert_equal(resumed.state_dict(), model.state_dict())


def test_next_save_waits_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    saver, model = BackgroundSaver(), toy.make()[0]
    saver.start(tmp_path / "1", iteration=1, model=model)
    threading.Timer(0.2, gate.set).start()
    saver.start(tmp_path / "2", iteration=2, model=model)
    assert (tmp_path / "1").exists()
    saver.wait()
    assert [path.name for path in find_all_checkpoints(tmp_path)] == ["1", "2"]


@pytest.mark.parametrize("failing", ["_digest_share", "_make_temporary", "start_saving_dcp"])
def test_full_disk_leaves_the_old_checkpoint_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saver, model = BackgroundSaver(), toy.make()[0]
    saver.start(tmp_path / "1", iteration=1, model=model)
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(saving, failing, fail)
        with pytest.raises(CheckpointError, match=r"checkpoint .*/2 could not be saved: .*No space left on device"):
            saver.start(tmp_path / "2", iteration=2, model=model)
            saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    saver.wait()  # said once
    saver.start(tmp_path / "2", iteration=2, model=model)
    saver.wait()
    assert [path.name for path in find_all_checkpoints(tmp_path)] == ["1", "2"]


def test_disk_that_is_full_while_tensors_are_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    def fail(*_: Any, **__: Any) -> None:
        time.sleep(0.05)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", fail)
    saver = BackgroundSaver()
    saver.start(tmp_path / "2", iteration=2, model=toy.make()[0])
    with pytest.raises(CheckpointError, match="No space left on device"):
        saver.wait()
    assert list(tmp_path.iterdir()) == []


def test_metadata_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metadata must be JSON"):
        BackgroundSaver().start(tmp_path / "1", iteration=1, model=toy.make()[0], metadata={"a": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []
