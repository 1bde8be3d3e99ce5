"""Checkpoints of sharded modules: saved by some processes, loaded by others."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dinov3.checkpointer import (
    BackgroundSaver,
    CheckpointError,
    RngState,
    RunLock,
    init_fsdp_model_from_checkpoint,
    latest_valid_checkpoint,
    load_checkpoint,
    read_manifest,
    read_tensors,
    save_checkpoint,
    saving,
)
from dinov3.fsdp import full_state_dict
from dinov3.fsdp.sharding import average_gradients
from tests.multiprocess import run_ranks

from . import toy

pytestmark = pytest.mark.distributed
ROWS = {0: slice(0, 2), 1: slice(2, 4)}


def make_sharded(seed: int, world_size: int) -> tuple[toy.Toy, torch.optim.Optimizer]:
    """The modules that `toy.make` makes, sharded."""
    model, _ = toy.make(seed)
    mesh = init_device_mesh("cpu", (world_size,))
    for network in (model.student, model.model_ema):
        for block in network["backbone"].blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(network["backbone"], mesh=mesh)
        fully_shard(network["dino_head"], mesh=mesh)
    average_gradients(model.student, mesh, MixedPrecisionPolicy())
    return model, toy.make_optimizer(model)


def full(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors, on every rank."""
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}


def train_and_save(rank: int, world_size: int, root: str) -> dict[str, Any]:
    model, optimizer = make_sharded(0, world_size)
    toy.train(model, optimizer, range(3), ROWS[rank])
    save_checkpoint(Path(root) / "2", iteration=2, model=model, optimizer=optimizer, rng=RngState())
    at_save = full(model)
    toy.train(model, optimizer, range(3, 5), ROWS[rank])
    return {"at_save": at_save, "at_end": full(model)}


def save_in_the_background(rank: int, world_size: int, root: str) -> dict[str, Any]:
    model, optimizer = make_sharded(0, world_size)
    toy.train(model, optimizer, range(3), ROWS[rank])
    at_save = full(model)
    saver = BackgroundSaver()
    saver.start(Path(root) / "2", iteration=2, model=model, optimizer=optimizer, rng=RngState())
    # Collectives of the training and of the save at the same time.
    toy.train(model, optimizer, range(3, 20), ROWS[rank])
    saver.wait()
    loaded, loaded_optimizer = make_sharded(1, world_size)
    load_checkpoint(Path(root) / "2", model=loaded, optimizer=loaded_optimizer, verify=True)
    problem = ""
    if rank == 1:
        saving._digest_share = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    try:
        saver.start(Path(root) / "3", iteration=3, model=model)
        saver.wait()
    except CheckpointError as error:
        problem = str(error)
    return {"at_save": at_save, "loaded": full(loaded), "problem": problem}


def load_and_train(rank: int, world_size: int, root: str) -> dict[str, Any]:
    model, optimizer = make_sharded(1, world_size)
    iteration = load_checkpoint(Path(root) / "2", model=model, optimizer=optimizer, rng=RngState())
    loaded = full(model)
    toy.train(model, optimizer, range(3, 5), ROWS[rank])
    return {"iteration": iteration, "loaded": loaded, "at_end": full(model)}


def test_one_process_loads_what_two_saved(ranks: list[dict[str, Any]], root: Path) -> None:
    saved = ranks[0]["save"]
    directory = root / "by_two" / "2"
    manifest = read_manifest(directory)
    assert manifest["world_size"] == 2 and {"__0_0.distcp", "__1_0.distcp", ".metadata"} <= set(manifest["files"])
    assert latest_valid_checkpoint(directory.parent, verify=True) == directory
    model, optimizer = toy.make(seed=3)
    assert load_checkpoint(directory, model=model, optimizer=optimizer) == 2
    toy.assert_equal(model.state_dict(), saved["at_save"])
    toy.assert_equal(read_tensors(directory, "model."), saved["at_save"])
    toy.train(model, optimizer, range(3, 5))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, saved["at_end"][name], rtol=1e-5, atol=1e-6)


def test_two_processes_continue_what_two_saved_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for of_rank in ranks:
        assert of_rank["load"]["iteration"] == 2
        toy.assert_equal(of_rank["load"]["loaded"], ranks[0]["save"]["at_save"])
        toy.assert_equal(of_rank["load"]["at_end"], ranks[0]["save"]["at_end"])


def test_two_processes_save_beside_their_training(ranks: list[dict[str, Any]], root: Path) -> None:
    for of_rank in ranks:
        toy.assert_equal(of_rank["background"]["loaded"], of_rank["background"]["at_save"])
        assert "3 could not be saved: OSError: [Errno 28] No space left on device" in of_rank["background"]["problem"]
    assert [path.name for path in (root / "background").iterdir()] == ["2"]


def test_two_processes_load_what_one_saved(ranks: list[dict[str, Any]], root: Path) -> None:
    model, optimizer = toy.make()
    load_checkpoint(root / "by_one" / "2", model=model, optimizer=optimizer)
    at_save = {name: value.clone() for name, value in model.state_dict().items()}
    toy.train(model, optimizer, range(3, 5))
    for of_rank in ranks:
        toy.assert_equal(of_rank["load_of_one"]["loaded"], at_save)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(of_rank["load_of_one"]["at_end"][name], value, rtol=1e-5, atol=1e-6)


def fail_on_one_rank(rank: int, world_size: int, root: str) -> dict[str, Any]:
    model, _ = make_sharded(0, world_size)
    messages = {}
    original = saving.save_dcp

    def fail(*args: Any) -> None:
        original(*args)
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    saving.save_dcp = fail  # type: ignore[assignment]
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(Path(root) / "1", iteration=1, model=model)
    messages["full disk"] = str(caught.value)
    saving.save_dcp = original
    save_checkpoint(Path(root) / "1", iteration=1, model=model)
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(Path(root) / "1", iteration=1, model=model, overwrite=False)
    messages["exists"] = str(caught.value)
    if rank == 0:
        path = Path(root) / "1" / "__1_0.distcp"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    torch.distributed.barrier()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(Path(root) / "1", model=model)
    messages["damaged"] = str(caught.value)
    return messages


def test_what_fails_on_one_rank_raises_on_all(ranks: list[dict[str, Any]], root: Path) -> None:
    first, second = (of_rank["failures"] for of_rank in ranks)
    assert first == second
    assert "No space left on device" in first["full disk"]
    assert "already exists" in first["exists"]
    assert "__1_0.distcp has a different checksum" in first["damaged"]
    assert [path.name for path in (root / "failing").iterdir()] == ["1"]


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def save_and_restore_generators(rank: int, world_size: int, root: str) -> dict[str, Any]:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(10 + rank)
    draw()
    save_checkpoint(Path(root) / "0", iteration=0, model=nn.Linear(1, 1), rng=RngState())
    expected = draw()
    load_checkpoint(Path(root) / "0", model=nn.Linear(1, 1), rng=RngState())
    return {"expected": expected, "restored": draw()}


def test_every_rank_gets_its_own_random_generators_back(
    ranks: list[dict[str, Any]], root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (of_rank["generators"] for of_rank in ranks)
    assert first["expected"] == first["restored"] and second["expected"] == second["restored"]
    assert first["expected"] != second["expected"]
    load_checkpoint(root / "generators" / "0", model=nn.Linear(1, 1), rng=RngState())
    assert "saved by 2 processes and resumed by 1" in caplog.text


def initialise_from(rank: int, world_size: int, root: str) -> list[Any]:
    results = []
    for path in (Path(root) / "teacher.pth", Path(root) / "2"):
        model, _ = make_sharded(7, world_size)
        init_fsdp_model_from_checkpoint(model.model_ema, path, keys_not_sharded=["periods"])
        assert any(hasattr(value, "full_tensor") for value in model.model_ema.state_dict().values())
        results.append(full(model.model_ema))
    with pytest.raises(ValueError, match=r"blocks\.0\.fc1\.weight is sharded, but keys_not_sharded names it"):
        init_fsdp_model_from_checkpoint(model.model_ema, path, keys_not_sharded=["blocks.0.fc1"])
    whole = full_state_dict(model.model_ema)
    return [*results, whole]


def test_sharded_network_starts_from_a_file_or_a_training(ranks: list[dict[str, Any]], root: Path) -> None:
    expected = read_tensors(root / "by_one" / "2", "model.model_ema.")
    (file, directory, whole), (_, of_second, of_others) = (of_rank["initialised"] for of_rank in ranks)
    for state in (file, directory, whole, of_second):
        toy.assert_equal(state, expected)
    assert of_others == {}


def enter_lock(rank: int, world_size: int, directory: str) -> str:
    with pytest.raises(RuntimeError) as caught, RunLock(directory):
        pass
    return str(caught.value)


def test_lock_of_another_run_is_refused_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = (of_rank["lock"] for of_rank in ranks)
    assert first == second and "in use by another run" in first


def do_everything(rank: int, world_size: int, root: str) -> dict[str, Any]:
    return {
        "save": train_and_save(rank, world_size, f"{root}/by_two"),
        "load": load_and_train(rank, world_size, f"{root}/by_two"),
        "load_of_one": load_and_train(rank, world_size, f"{root}/by_one"),
        "failures": fail_on_one_rank(rank, world_size, f"{root}/failing"),
        "generators": save_and_restore_generators(rank, world_size, f"{root}/generators"),
        "initialised": initialise_from(rank, world_size, f"{root}/by_one"),
        "lock": enter_lock(rank, world_size, root),
        "background": save_in_the_background(rank, world_size, f"{root}/background"),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[dict[str, Any]]:
    """What each of two processes returns; one start of them serves all tests, because it takes seconds."""
    model, optimizer = toy.make()
    toy.train(model, optimizer, range(3))
    save_checkpoint(root / "by_one" / "2", iteration=2, model=model, optimizer=optimizer, rng=RngState())
    torch.save({"teacher": model.model_ema.state_dict()}, root / "by_one" / "teacher.pth")
    with RunLock(root):
        return run_ranks(do_everything, 2, str(root))
