from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dinov3 import distributed
from tests.multiprocess import run_ranks

OPERATIONS = ("sum", "mean", "max", "min")


def test_without_a_group_one_process_answers_for_itself() -> None:
    assert not distributed.is_enabled()
    assert (distributed.get_rank(), distributed.get_world_size(), distributed.is_main_process()) == (0, 1, True)
    assert (distributed.get_subgroup_rank(), distributed.get_subgroup_size()) == (0, 1)
    assert distributed.get_process_subgroup() is None and distributed.get_default_process_group() is None
    tensor = torch.tensor(3.0, requires_grad=True)
    for operation in OPERATIONS:
        assert distributed.all_reduce(tensor, operation) is tensor
    assert distributed.all_gather_with_grad(tensor) is tensor
    assert distributed.gather_all_tensors(tensor) == [tensor]
    assert distributed.broadcast_object("x") == "x" and distributed.all_gather_objects(1) == [1]
    distributed.barrier()


def test_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match="average"):
        distributed.all_reduce(torch.ones(1), "average")


def reduce_everything(rank: int, world_size: int) -> dict[str, Any]:
    reduced: dict[str, Any] = {}
    for operation in OPERATIONS:
        tensor = torch.tensor([rank + 1.0, -rank])
        assert distributed.all_reduce(tensor, operation) is tensor
        reduced[operation] = tensor
    reduced["scalar"] = distributed.all_reduce(torch.tensor(float(rank)))
    shapes = [(), (2, 3), (3, 1)]
    gathered = [
        distributed.gather_all_tensors(torch.full((), float(rank))),
        distributed.gather_all_tensors(torch.full(shapes[rank + 1], float(rank))),
        distributed.gather_all_tensors(torch.full((rank, 2), rank)),
    ]
    reduced["gathered"] = gathered
    reduced["objects"] = (distributed.broadcast_object({"from": rank}), distributed.all_gather_objects(rank))
    return reduced


@pytest.mark.distributed
def test_two_processes_reduce_and_gather() -> None:
    for result in run_ranks(reduce_everything, 2):
        assert result["sum"].tolist() == [3, -1]
        assert result["mean"].tolist() == [1.5, -0.5]
        assert result["max"].tolist() == [2, 0]
        assert result["min"].tolist() == [1, -1]
        assert result["scalar"] == 1 and result["scalar"].shape == ()
        scalars, padded, empty = result["gathered"]
        assert scalars == [0.0, 1.0]
        assert torch.equal(padded[0], torch.zeros(2, 3)) and torch.equal(padded[1], torch.ones(3, 1))
        assert empty[0].shape == (0, 2) and torch.equal(empty[1], torch.ones(1, 2, dtype=torch.int64))
        assert result["objects"] == ({"from": 0}, [0, 1])


def loss_of_everything(features: Tensor) -> Tensor:
    return (features @ features.T).square().sum()


def gather_and_differentiate(rank: int, world_size: int) -> dict[str, Tensor]:
    own = torch.linspace(-1, 1, 12).reshape(2, 2, 3)[rank].clone().requires_grad_()
    gathered = distributed.all_gather_with_grad(own)
    # Ranks use what they gathered differently: the gradients must be summed over the ranks.
    (loss_of_everything(gathered) * (rank + 1)).backward()
    assert own.grad is not None
    return {"gathered": gathered.detach(), "gradient": own.grad}


@pytest.mark.distributed
def test_gradient_of_gathered_rows_returns_to_their_owner() -> None:
    everything = torch.linspace(-1, 1, 12).reshape(4, 3).requires_grad_()
    (loss_of_everything(everything) * (1 + 2)).backward()
    first, second = run_ranks(gather_and_differentiate, 2)
    assert torch.equal(first["gathered"], everything.detach()) and torch.equal(second["gathered"], everything.detach())
    gradients = torch.cat([first["gradient"], second["gradient"]])
    assert everything.grad is not None
    torch.testing.assert_close(gradients, everything.grad)


def work_in_subgroups(rank: int, world_size: int) -> dict[str, Any]:
    with pytest.raises(ValueError, match="each of the 3 ranks once"):
        distributed.new_subgroups([[0, 1]])
    distributed.new_subgroups([[0], [1, 2]])
    with pytest.raises(RuntimeError, match="only once"):
        distributed.new_subgroups([[0, 1, 2]])
    numbers = {
        "rank": distributed.get_subgroup_rank(),
        "size": distributed.get_subgroup_size(),
        "is_main": distributed.is_subgroup_main_process(),
        "sum": float(distributed.all_reduce(torch.tensor(float(rank)))),
        "world_sum": float(distributed.all_reduce(torch.tensor(float(rank)), group=dist.group.WORLD)),
        "first": distributed.broadcast_object(rank),
        "tensors": [int(t) for t in distributed.gather_all_tensors(torch.tensor(rank))],
        "world_rank": distributed.get_rank(),
    }
    return numbers


@pytest.mark.distributed
def test_subgroups_reduce_among_themselves() -> None:
    alone, first, second = run_ranks(work_in_subgroups, 3)
    expected = {"rank": 0, "size": 1, "is_main": True, "sum": 0, "world_sum": 3, "first": 0, "tensors": [0]}
    assert alone == expected | {"world_rank": 0}
    expected = {"size": 2, "sum": 3, "world_sum": 3, "first": 1, "tensors": [1, 2]}
    assert first == expected | {"rank": 0, "is_main": True, "world_rank": 1}
    assert second == expected | {"rank": 1, "is_main": False, "world_rank": 2}
