"""Golden cases of the schedules that configurations and recipes give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dinov3 import distributed
from dinov3.configs import apply_scaling_rules_to_cfg
from dinov3.train.schedules import apply_optim_scheduler, build_schedulers

from . import arch as builder
from . import golden

NAMES = ("lr", "weight_decay", "momentum", "teacher_temp", "last_layer_lr")


@pytest.mark.parametrize("case", golden.cases("ssl", "build_schedulers/", "recipe_schedule/"), ids=lambda c: c["id"])
def test_schedules_of_a_configuration(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "get_world_size", lambda group=None: case["world_size"])
    cfg = builder.config(case)
    apply_scaling_rules_to_cfg(cfg)
    for name, schedule in zip(NAMES, build_schedulers(cfg), strict=True):
        got = np.array([schedule[index] for index in case["indices"]])
        want = golden.tensors("ssl")[f"{case['id']}/{name}"].numpy()
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=0, err_msg=name)


def test_settings_reach_the_parameter_groups() -> None:
    case = golden.case("trainer", "apply-optim-scheduler")
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], **group} for group in case["groups"]]
    optimizer = torch.optim.AdamW(groups)
    apply_optim_scheduler(optimizer, *case["args"])
    for group, want in zip(optimizer.param_groups, case["expect"], strict=True):
        assert {key: group[key] for key in want} == pytest.approx(want, rel=1e-12)
