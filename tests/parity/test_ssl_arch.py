"""Golden cases of one step of self-distillation, of the loop's order of events, and of rejected configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.train.param_groups import get_params_groups_with_decay_fsdp
from dinov3.train.ssl_meta_arch import SSLMetaArch
from tests.multiprocess import run_ranks

from . import arch as builder
from . import golden


@pytest.mark.parametrize("case", golden.cases("ssl", "arch/"), ids=lambda case: case["id"])
def test_one_step_equals_the_published_method(case: dict[str, Any], tmp_path: Path) -> None:
    arch = builder.build(case, tmp_path)
    outputs = builder.step_outputs(arch, case, builder.batch(case["data"]))

    if "ema_momentum" in case:
        arch.update_ema(case["ema_momentum"])
        ema = dict(arch.model_ema.named_parameters())
        outputs |= {"ema.param_norms": builder.norms(arch.model_ema)} | builder.slices("ema", ema)
    if case.get("update_gram"):
        arch.update_gram()
        assert arch.gram_teacher is not None
        outputs["gram_after_update.param_norms"] = builder.norms(arch.gram_teacher)
    assert builder.compare(case, outputs) == len(case["outputs"])
    assert [n.removeprefix("loss/") for n in outputs if n.startswith("loss/")] == case["expected"]["metrics_keys"]


def _step_of_rank(rank: int, world_size: int, case_id: str, directory: Path) -> dict[str, torch.Tensor]:
    case = golden.case("ssl", case_id)
    arch = builder.build(case, directory)
    data = builder.batch(case["data"], seed_offset=rank, masks=case["data"]["masks_per_rank"][rank])
    outputs = builder.step_outputs(arch, case, data)
    for parameter in arch.student.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= world_size
    means = builder.gradients(dict(arch.student.named_parameters()))
    return outputs | {f"rank_mean.{name}": value for name, value in means.items()}


@pytest.mark.distributed
def test_two_ranks_share_sinkhorn_and_koleo(tmp_path: Path) -> None:
    case = golden.case("ssl", "arch_world2/koleo_distributed")
    for rank, outputs in enumerate(run_ranks(_step_of_rank, 2, case["id"], tmp_path)):
        builder.compare(case, outputs, prefix=f"rank{rank}.")


@pytest.mark.parametrize("case_id", ["arch_errors/valid", "arch_errors/invalid"])
def test_configurations_are_accepted_or_rejected(case_id: str) -> None:
    from dinov3.configs import validate

    case = golden.case("ssl", case_id)
    checked = 0
    for entry, raises in zip(case["entries"], case["expected"]["raises"], strict=True):
        cfg = builder.config(case, entry["config"])
        if raises is None:
            validate(cfg)
            with torch.device("meta"):
                SSLMetaArch(cfg)
        else:
            with pytest.raises((ValueError, NotImplementedError, KeyError)):
                validate(cfg)
                SSLMetaArch(cfg).init_weights()
        checked += 1
    assert checked == len(case["entries"])


@pytest.mark.parametrize(
    "case", golden.cases("ssl", "param_groups/vit", "param_groups/convnext"), ids=lambda c: c["id"]
)
def test_parameter_groups(case: dict[str, Any]) -> None:
    with torch.device("meta"):
        arch = SSLMetaArch(builder.config(case))
    optim = arch.cfg.optim
    rows = []
    for name, network in arch.student.items():
        groups = get_params_groups_with_decay_fsdp(
            network,
            lr_decay_rate=optim.layerwise_decay,
            patch_embed_lr_mult=optim.patch_embed_lr_mult,
            dino_head_wd_multiplier=optim.dino_head_wd_multiplier,
        )
        rows += [
            [name, g["name"], pytest.approx(g["lr_multiplier"], rel=1e-12), g["wd_multiplier"], g["is_last_layer"]]
            for g in groups
            if _is_listed(g["name"], case.get("only_blocks"))
        ]
    assert rows == case["expected"]["table"]
    fused = [
        [len(g["params"]), pytest.approx(g["lr_multiplier"], rel=1e-12), g["wd_multiplier"], g["is_last_layer"]]
        for g in arch.get_params_groups()
    ]
    assert fused == case["expected"]["fused"]


def _is_listed(name: str, only_blocks: list[str] | None) -> bool:
    parts = name.split(".")
    return only_blocks is None or parts[0] != "blocks" or parts[1] in only_blocks
