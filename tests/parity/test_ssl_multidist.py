"""Golden cases of several students: what is exchanged between the processes, and one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dinov3.distributed import distribute_to_subgroups, new_subgroups
from dinov3.train.multidist_meta_arch import MultiDistillationMetaArch
from tests.multiprocess import run_ranks

from . import arch as builder
from . import deterministic, golden


def _exchange(rank: int, world_size: int, case_id: str) -> torch.Tensor:
    case = golden.case("ssl", case_id)
    new_subgroups(case["subgroups"])
    given = case["inputs"][rank]
    part = deterministic.tensor(given["name"], tuple(given["shape"]), given["seed"])
    return distribute_to_subgroups(part, case["over_dim"], case["kwargs"].get("global_batch_size"))


@pytest.mark.distributed
@pytest.mark.parametrize("case", golden.cases("ssl", "broadcast/"), ids=lambda case: case["id"])
def test_every_subgroup_gets_the_whole(case: dict[str, Any]) -> None:
    for rank, got in enumerate(run_ranks(_exchange, case["world_size"], case["id"])):
        want = golden.tensors("ssl")[f"{case['id']}/rank{rank}.out"]
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def _step_of_rank(rank: int, world_size: int, case_id: str, directory: Path) -> dict[str, torch.Tensor]:
    case = golden.case("ssl", case_id)
    new_subgroups(case["subgroups"])
    student = case["students"][next(i for i, ranks in enumerate(case["subgroups"]) if rank in ranks)]
    own = case | {
        "config": OmegaConf.to_container(OmegaConf.merge(case["config"], student["config"])),
        "seeds": student["seeds"],
    }
    (directory / str(rank)).mkdir()
    arch = builder.build(own, directory / str(rank), MultiDistillationMetaArch)
    data = builder.batch(case["data"], seed_offset=rank, masks=case["data"]["masks_per_rank"][rank])
    return builder.step_outputs(arch, case, data)


@pytest.mark.distributed
@pytest.mark.parametrize("case", golden.cases("ssl", "multidist/"), ids=lambda case: case["id"])
def test_one_step_of_several_students(case: dict[str, Any], tmp_path: Path) -> None:
    outputs_of_ranks = run_ranks(_step_of_rank, case["world_size"], case["id"], tmp_path)
    compared = sum(
        builder.compare(case, outputs, prefix=f"rank{rank}.") for rank, outputs in enumerate(outputs_of_ranks)
    )
    assert compared == len(case["outputs"])
