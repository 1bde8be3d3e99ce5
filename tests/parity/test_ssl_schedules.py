"""Golden cases of the schedule functions and of parameter names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from . import golden


@pytest.mark.parametrize("case", golden.cases("ssl", "cosine_scheduler/"), ids=lambda c: c["id"])
def test_cosine_scheduler(case: dict[str, Any]) -> None:
    scheduler = golden.target("dinov3.train.cosine_lr_scheduler.CosineScheduler")(**case["build"])
    stored = golden.tensors("ssl")
    got = np.array([scheduler[index] for index in case["indices"]])
    np.testing.assert_allclose(got, stored[f"{case['id']}/values"].numpy(), rtol=1e-12, atol=0)
    assert [len(scheduler.schedule)] == stored[f"{case['id']}/length"].tolist()
    assert scheduler.schedule.dtype == np.float64


@pytest.mark.parametrize("case", golden.cases("ssl", "linear_warmup_cosine/"), ids=lambda c: c["id"])
def test_linear_warmup_cosine_decay(case: dict[str, Any]) -> None:
    values = golden.target("dinov3.train.cosine_lr_scheduler.linear_warmup_cosine_decay")(**case["build"])
    assert values.dtype == np.float64
    want = golden.tensors("ssl")[f"{case['id']}/values"].numpy()
    np.testing.assert_allclose(values, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", [c for c in golden.cases("ssl") if c["kind"] == "rename"], ids=lambda c: c["id"])
def test_parameter_names_and_rates(case: dict[str, Any]) -> None:
    remove = golden.target("dinov3.train.param_groups.remove_fsdp_compile_names")
    assert [remove(name) for name in case["names"]] == case["expected"]["renamed"]
    rate = golden.target("dinov3.train.param_groups.get_vit_lr_decay_rate")
    got = [rate(**arguments) for arguments in case["rates"]]
    assert got == pytest.approx(case["expected"]["rates"], rel=1e-12)
