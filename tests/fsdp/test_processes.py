"""Two processes that share a sharded network train what one process trains."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinov3 import distributed
from dinov3.distributed import runtime
from dinov3.fsdp import ac_compile_parallelize, clip_grad_norm_, full_state_dict
from tests.checkpointer import toy
from tests.multiprocess import run_ranks

pytestmark = pytest.mark.distributed


def config(fsdp: str = "auto", param_dtype: str = "fp32") -> Any:
    train = {"checkpointing": True, "checkpointing_full": False, "compile": False, "cudagraphs": False, "fsdp": fsdp}
    precision = {"param_dtype": param_dtype, "reduce_dtype": "fp32", "sharding_strategy": "SHARD_GRAD_OP"}
    return OmegaConf.create({"train": train, "compute_precision": precision})


def train(rank: int, world_size: int, param_dtype: str = "fp32") -> dict[str, Any]:
    torch.manual_seed(0)
    student, teacher = toy.network(8, 6), toy.network(8, 6).requires_grad_(False)
    subgroup = distributed.get_process_subgroup()
    ac_compile_parallelize(student, [teacher], config(param_dtype=param_dtype), subgroup, [None])
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, foreach=True)
    norms = []
    share = 4 // world_size
    for step in range(10):
        x = toy.batch(step)[rank * share : (rank + 1) * share]
        target = teacher["dino_head"](teacher["backbone"](x)).float()
        optimizer.zero_grad(set_to_none=True)
        (student["dino_head"](student["backbone"](x)).float() - 3 * target).square().mean().backward()
        norms += [float(clip_grad_norm_(network, 0.5)) for network in student.values()]
        optimizer.step()
    assert all(isinstance(p, DTensor) for p in student.parameters()) == (world_size > 1 or param_dtype == "bf16")
    return {"state": full_state_dict(student), "norms": norms}


def refuse_never(rank: int, world_size: int) -> str:
    with pytest.raises(ValueError) as caught:
        ac_compile_parallelize(toy.network(8, 6), [], config(fsdp="never"))
    return str(caught.value)


def train_in_subgroups(rank: int, world_size: int) -> dict[str, Tensor]:
    """Each process is a subgroup with its own student; the teacher is sharded over both."""
    distributed.new_subgroups([[0], [1]])
    torch.manual_seed(0)
    teacher = toy.network(8, 6).requires_grad_(False)
    torch.manual_seed(rank)
    student = toy.network(8, 6)
    ac_compile_parallelize(student, [teacher], config(), distributed.get_process_subgroup(), [None])
    assert student["dino_head"].weight.device_mesh.size() == 1
    assert teacher["dino_head"].weight.device_mesh.size() == 2
    x = toy.batch(0)
    loss = (student["dino_head"](student["backbone"](x)) - teacher["dino_head"](teacher["backbone"](x))).square().mean()
    loss.backward()
    return {name: p.grad.full_tensor() for name, p in student.named_parameters() if p.grad is not None}


def do_everything(rank: int, world_size: int) -> dict[str, Any]:
    os.environ[runtime.DEVICE_VARIABLE] = "cpu"
    return {
        "fp32": train(rank, world_size),
        "bf16": train(rank, world_size, "bf16"),
        "never": refuse_never(rank, world_size),
        "subgroups": train_in_subgroups(rank, world_size),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each of two processes returns; one start of them serves all tests, because it takes seconds."""
    return run_ranks(do_everything, 2)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(runtime.DEVICE_VARIABLE, "cpu")
    yield
    distributed.disable()


def test_two_processes_train_to_the_parameters_of_one(ranks: list[dict[str, Any]]) -> None:
    one = train(0, 1)
    first, second = (of_rank["fp32"] for of_rank in ranks)
    assert first["norms"] == second["norms"]
    assert first["norms"] == pytest.approx(one["norms"], rel=1e-5)
    assert max(one["norms"]) > 0.5  # otherwise clipping does nothing
    assert second["state"] == {}
    assert first["state"].keys() == one["state"].keys()
    for name, value in one["state"].items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-5)


def test_mixed_precision_starts_alike_on_any_number_of_processes(ranks: list[dict[str, Any]]) -> None:
    one = train(0, 1, "bf16")
    first = ranks[0]["bf16"]
    # Of the first step; later ones drift apart, because AdamW magnifies what bfloat16 rounds.
    assert first["norms"][:2] == pytest.approx(one["norms"][:2], rel=1e-2)
    assert first["norms"][:2] != pytest.approx(ranks[0]["fp32"]["norms"][:2], rel=1e-6)
    assert {value.dtype for name, value in first["state"].items() if "periods" not in name} == {torch.float32}


def test_unsharded_processes_are_refused(ranks: list[dict[str, Any]]) -> None:
    assert all("train.fsdp=never leaves 2 processes without a common gradient" in rank["never"] for rank in ranks)


def test_students_of_subgroups_do_not_mix_their_gradients(ranks: list[dict[str, Any]]) -> None:
    for rank, of_rank in enumerate(ranks):
        torch.manual_seed(0)
        teacher = toy.network(8, 6)
        torch.manual_seed(rank)
        student = toy.network(8, 6)
        x = toy.batch(0)
        target = teacher["dino_head"](teacher["backbone"](x)).detach()
        (student["dino_head"](student["backbone"](x)) - target).square().mean().backward()
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(of_rank["subgroups"][name], parameter.grad)
