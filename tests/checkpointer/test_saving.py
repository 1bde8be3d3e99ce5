"""What `save_checkpoint` writes, and what is left when it cannot."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from dinov3.checkpointer import (
    CheckpointError,
    find_all_checkpoints,
    latest_valid_checkpoint,
    load_checkpoint,
    read_manifest,
    read_tensors,
    remove_stale_temporaries,
    save_checkpoint,
    saving,
)
from dinov3.checkpointer.manifest import digest_file
from tests.multiprocess import start

from . import toy


class Counter:
    """Something else that is saved, nested."""

    def __init__(self, count: int = 0) -> None:
        self.state: dict[str, Any] = {"count": count, "nested": {"values": [1.5, 2.5], "mask": torch.tensor([True])}}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_saved_training_continues_bit_for_bit_without_a_process_group(tmp_path: Path) -> None:
    assert not torch.distributed.is_initialized()
    model, optimizer = toy.make()
    toy.train(model, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 0.005
    save_checkpoint(tmp_path / "2", iteration=2, model=model, optimizer=optimizer, counter=Counter(7))

    resumed, resumed_optimizer = toy.make(seed=1)
    counter = Counter()
    iteration = load_checkpoint(tmp_path / "2", model=resumed, optimizer=resumed_optimizer, counter=counter)
    assert iteration == 2 and counter.state["count"] == 7
    assert counter.state["nested"]["values"] == [1.5, 2.5] and counter.state["nested"]["mask"].tolist() == [True]
    assert [g["lr"] for g in resumed_optimizer.param_groups] == [0.005, 0.01]
    toy.assert_equal(resumed.state_dict(), model.state_dict())
    for each in ((model, optimizer), (resumed, resumed_optimizer)):
        toy.train(*each, range(3, 6))
    toy.assert_equal(resumed.state_dict(), model.state_dict())


def test_entries_have_the_published_names(tmp_path: Path) -> None:
    model, optimizer = toy.make()
    toy.train(model, optimizer, range(1))
    save_checkpoint(tmp_path / "0", iteration=0, model=model, optimizer=optimizer, counter=Counter())
    entries = set(FileSystemReader(tmp_path / "0").read_metadata().state_dict_metadata)
    assert {"iteration", "counter.count", "counter.nested.values", "counter.nested.mask"} <= entries
    assert {f"model.{key}" for key in model.state_dict()} <= entries
    weight = "optimizer.state.student.backbone.blocks.0.fc1.weight"
    assert {f"{weight}.exp_avg", f"{weight}.exp_avg_sq", f"{weight}.step"} <= entries
    assert {"optimizer.param_groups.0.lr", "optimizer.param_groups.1.is_last_layer"} <= entries


def test_manifest_lists_every_other_file_with_size_and_checksum(tmp_path: Path) -> None:
    model, _ = toy.make()
    save_checkpoint(tmp_path / "4", iteration=4, model=model, metadata={"config": {"lr": 0.1}})
    manifest = read_manifest(tmp_path / "4")
    others = {path.name for path in (tmp_path / "4").iterdir()} - {"checkpoint.json"}
    assert set(manifest["files"]) == others and ".metadata" in others
    for name, entry in manifest["files"].items():
        assert entry == digest_file(tmp_path / "4" / name)
    assert manifest["iteration"] == 4 and manifest["world_size"] == 1 and manifest["torch"] == torch.__version__
    assert manifest["contents"] == ["iteration", "model"] and manifest["metadata"] == {"config": {"lr": 0.1}}


def test_checksum_is_the_standard_crc32(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123456789")
    assert digest_file(tmp_path / "file") == {"bytes": 9, "crc32": "cbf43926"}


def test_metadata_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metadata must be JSON"):
        save_checkpoint(tmp_path / "1", iteration=1, model=toy.make()[0], metadata={"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_existing_directory_is_replaced_or_refused(tmp_path: Path) -> None:
    first, second = toy.make(0)[0], toy.make(1)[0]
    save_checkpoint(tmp_path / "1", iteration=1, model=first)
    (tmp_path / "1" / "leftover").touch()
    with pytest.raises(CheckpointError, match="overwrite is off"):
        save_checkpoint(tmp_path / "1", iteration=1, model=second, overwrite=False)
    loaded = toy.make(2)[0]
    load_checkpoint(tmp_path / "1", model=loaded)
    toy.assert_equal(loaded.state_dict(), first.state_dict())
    save_checkpoint(tmp_path / "1", iteration=1, model=second)
    load_checkpoint(tmp_path / "1", model=loaded)
    toy.assert_equal(loaded.state_dict(), second.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["1"] and not (tmp_path / "1" / "leftover").exists()


def test_compiled_and_activation_checkpointed_modules_save_plain_names(tmp_path: Path) -> None:
    from dinov3.fsdp.ac_compile_parallelize import checkpoint_activations

    model, _ = toy.make()
    checkpoint_activations(model.student["backbone"].blocks, full=True)
    model.student["dino_head"].compile()
    save_checkpoint(tmp_path / "1", iteration=1, model=model)
    assert set(read_tensors(tmp_path / "1", "model.")) == set(toy.make()[0].state_dict())


@pytest.mark.parametrize("failing", ["save_dcp", "write_manifest", "digest_file"])
def test_full_disk_leaves_the_old_checkpoint_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    first, second = toy.make(0)[0], toy.make(1)[0]
    save_checkpoint(tmp_path / "1", iteration=1, model=first)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, failing, fail)
        with pytest.raises(CheckpointError, match=r"checkpoint .*/1 could not be saved: .*No space left on device"):
            save_checkpoint(tmp_path / "1", iteration=1, model=second)
        with pytest.raises(CheckpointError, match="No space left"):
            save_checkpoint(tmp_path / "2", iteration=2, model=second)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    loaded = toy.make(2)[0]
    load_checkpoint(tmp_path / "1", model=loaded)
    toy.assert_equal(loaded.state_dict(), first.state_dict())


def test_interrupt_while_saving_leaves_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "save_dcp", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "1", iteration=1, model=toy.make()[0])
    assert list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ckpt").mkdir()
    # The administrator may write everywhere, so permissions alone do not test it.
    mkdir = Path.mkdir

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name.startswith(".tmp-"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"checkpoint .*ckpt/5 could not be saved: .*Permission denied"):
        save_checkpoint(tmp_path / "ckpt" / "5", iteration=5, model=toy.make()[0])


def test_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ckpt").touch()
    with pytest.raises(CheckpointError, match=r"checkpoint .*ckpt/5 could not be saved"):
        save_checkpoint(tmp_path / "ckpt" / "5", iteration=5, model=toy.make()[0])


@pytest.mark.parametrize("moment", ["before the old one goes", "between", "before the old one is deleted"])
def test_crash_while_replacing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    class Crash(BaseException):
        pass

    first, second = toy.make(0)[0], toy.make(1)[0]
    save_checkpoint(tmp_path / "1", iteration=1, model=first)
    rename, renamed = Path.rename, []

    def rename_some(path: Path, target: Path) -> Path:
        renamed.append(path)
        if (moment == "before the old one goes" and len(renamed) == 1) or (moment == "between" and len(renamed) == 2):
            raise Crash
        return rename(path, target)

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_some)
        patch.setattr(shutil, "rmtree", crash)
        with pytest.raises(Crash):
            save_checkpoint(tmp_path / "1", iteration=1, model=second)
    remove_stale_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    loaded = toy.make(2)[0]
    load_checkpoint(latest_valid_checkpoint(tmp_path) or "", model=loaded)
    expected = second if moment == "before the old one is deleted" else first
    toy.assert_equal(loaded.state_dict(), expected.state_dict())


def test_stale_temporaries_go_and_everything_else_stays(tmp_path: Path) -> None:
    for name in (".tmp-5-0123abcd", ".tmp-6_keep-0123abcd", ".tmp-7-0123abcd.old", "8", "8_keep", "best", ".tmp-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_stale_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-mine", "7", "8", "8_keep", "best"]
    remove_stale_temporaries(tmp_path / "absent")


def save_for_ever(root: Path) -> None:
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(12)))
    for i in itertools.count():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(i)
        # Every other save replaces the one before.
        save_checkpoint(root / str(i // 2), iteration=i, model=model)
        (root / "finished").write_text(str(i))


def kill_while_saving(directory: Path, n_attempts: int) -> None:
    # The first save of a process is slow; its children start behind it.
    save_checkpoint(directory / "warm" / "0", iteration=0, model=nn.Linear(1, 1))
    for attempt in range(n_attempts):
        root = directory / str(attempt)
        if (victim := os.fork()) == 0:
            save_for_ever(root)
        while not (root / "finished").exists():
            time.sleep(0.001)
        time.sleep(0.05 + 0.004 * attempt)
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)


@pytest.mark.distributed
def test_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    n_attempts = 8
    process = start(kill_while_saving, tmp_path, n_attempts, output=tmp_path / "said.txt")
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "said.txt").read_text()
    interrupted = 0
    for root in (tmp_path / str(attempt) for attempt in range(n_attempts)):
        text = (root / "finished").read_text()
        (root / "finished").unlink()
        interrupted += any(path.name.startswith(".tmp-") for path in root.iterdir())
        remove_stale_temporaries(root)
        assert all(path.name.isdecimal() for path in root.iterdir())
        newest = latest_valid_checkpoint(root, verify=True)
        assert newest is not None and newest == find_all_checkpoints(root)[-1]
        iteration = read_manifest(newest)["iteration"]
        if text:  # the kill may also come while this is written, or before
            assert iteration in (int(text), int(text) + 1)
        values = {float(value) for tensor in read_tensors(newest, "model.").values() for value in tensor.unique()}
        assert values == {float(iteration)}
    assert interrupted > 0, "no kill came during a save: the test shows nothing"


def test_manifest_is_written_after_all_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[set[str]] = []
    original = saving.write_manifest

    def spy(directory: Path, **arguments: Any) -> None:
        there.append({path.name for path in directory.iterdir()})
        original(directory, **arguments)

    monkeypatch.setattr(saving, "write_manifest", spy)
    save_checkpoint(tmp_path / "1", iteration=1, model=toy.make()[0])
    assert there == [set(json.loads((tmp_path / "1" / "checkpoint.json").read_text())["files"])]
